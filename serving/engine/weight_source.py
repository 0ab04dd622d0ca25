"""Where a rank's weights come from: its model's files, or nowhere."""

from __future__ import annotations

import torch

from serving.engine.executor import ExecutorOptions, RandomWeights
from serving.models.random_weights import RandomSource
from serving.models.weights import TensorSource, open_weights


def source_of(options: ExecutorOptions, dtype: torch.dtype, device: torch.device) -> TensorSource:
    """The tensors `options` names. Raises ModelFileError as `open_weights` does."""
    if isinstance(options.weights, RandomWeights):
        return RandomSource(options.weights.seed, dtype, device)
    return open_weights(options.weights, options.spec, dtype)
