"""The CPU's fast path: the model on the native library, and how an engine that began without gets it.

A machine that has compiled the library before starts with it. One that has not begins on the torch
path and compiles beside it; when the model is loaded a second time the runners are exchanged between
two steps. They share the KV cache, so no request notices.
"""

from __future__ import annotations

import ctypes
import logging
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu import library as native
from serving.engine.executor import ExecutorOptions
from serving.engine.native_sampler import sample_native
from serving.engine.plan import SamplingBatch, StepPlan
from serving.engine.weight_source import source_of
from serving.models.layers import Shard
from serving.models.native_llama import NativeLlama, Precision, unsupported

logger = logging.getLogger(__name__)


def precision_of(options: ExecutorOptions) -> Precision | None:
    """In which precision the native library serves such a rank; None where it does not."""
    if options.device != "cpu":
        return None
    if options.dtype != "bfloat16" and options.dtype != "int8":
        return None
    why = native.unsupported() or unsupported(options.spec, options.world_size, options.block_tokens)
    if why is None and options.kv_dtype != "auto":
        why = f"kv_dtype {options.kv_dtype} is not the native library's"
    if why is not None:
        logger.warning("%s runs on torch's kernels, several times slower: %s", options.dtype, why)
        return None
    return options.dtype


def load_native(
    options: ExecutorOptions, precision: Precision, shard: Shard, library: ctypes.CDLL
) -> NativeLlama:
    """This rank's part of the model. Raises ModelFileError as the torch path does."""
    source = source_of(options, torch.bfloat16, torch.device("cpu"))
    return NativeLlama(options.spec, source, shard, precision, library)


class NativeRunner:
    """Runs plans whose slots and block tables lie within the model's KV cache."""

    def __init__(self, model: NativeLlama) -> None:
        self._model = model

    @property
    def bytes_per_weight(self) -> float:
        """What a step reads for each of the model's weights, scales included."""
        return self._model.bytes_per_weight

    @torch.inference_mode()
    def hidden(self, plan: StepPlan) -> torch.Tensor:
        """Run `plan`'s tokens; returns hidden states [S, d] of the rows whose logits are wanted."""
        return self._model.forward(
            plan.token_ids,
            plan.positions,
            plan.slot_mapping,
            plan.query_start,
            plan.context_lens,
            plan.block_tables,
            plan.logits_rows,
        )

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Run `plan`; returns its float32 logits [S, V]. Rank 0 only."""
        return self._model.logits(self.hidden(plan))

    def draw(self, logits: torch.Tensor, sampling: SamplingBatch) -> NDArray[np.int32]:
        """One token a row of logits [S, V], -1 where a row is not finite. Rank 0 only."""
        return sample_native(self._model.library, logits, sampling, self._model.num_threads)

    def run_linears(self, num_tokens: int) -> None:
        """The matrix products of a step of so many tokens alone: what a step cannot be faster than."""
        self._model.run_linears(num_tokens)


class NativeUpgrade:
    """Compiles and loads in a thread of its own; `take` gives the runner once it stands."""

    def __init__(self, options: ExecutorOptions, precision: Precision, kv_cache: torch.Tensor) -> None:
        self._options = options
        self._precision = precision
        self._kv_cache = kv_cache
        self._runner: NativeRunner | None = None
        self._thread = threading.Thread(target=self._prepare, name="native-build", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """It has come, or it will not."""
        return not self._thread.is_alive()

    def take(self) -> NativeRunner | None:
        return self._runner

    def _prepare(self) -> None:
        options = self._options
        try:
            library = native.build()
        except (RuntimeError, OSError) as failed:
            logger.warning("%s stays on torch's kernels, several times slower: %s", options.dtype, failed)
            return
        if options.world_size > 1:
            logger.info("the native library is compiled; ranks use it from the next start on")
            return
        model = load_native(options, self._precision, Shard(), library)
        model.attach(self._kv_cache, options.num_threads)
        self._runner = NativeRunner(model)
        logger.info("the native library is compiled, and takes over from torch's kernels")
