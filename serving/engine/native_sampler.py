"""The sampler on the native library: the same rules as `sampler.py`, row by row on all threads."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engine.plan import SamplingBatch
from serving.engine.uniform import uniform


def sample_native(
    library: ctypes.CDLL, logits: torch.Tensor, sampling: SamplingBatch, num_threads: int
) -> NDArray[np.int32]:
    """One token a row of float32 logits [S, V] on CPU, [S]; -1 where a row is not finite."""
    assert logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.stride(1) == 1
    tokens = np.empty(len(logits), dtype=np.int32)
    numbers = uniform(sampling.seed, sampling.position)
    library.searoom_sample(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        sampling.temperature.ctypes.data,
        sampling.top_k.ctypes.data,
        sampling.top_p.ctypes.data,
        sampling.min_p.ctypes.data,
        numbers.ctypes.data,
        num_threads,
        tokens.ctypes.data,
    )
    return tokens
