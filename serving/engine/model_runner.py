"""One rank's model and its KV cache: a step's plan in, logits out."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu.packing import Arena
from kernels.paged_attention import plan_attention
from serving.engine.plan import SamplingBatch, StepPlan
from serving.engine.sampler import sample
from serving.models.llama import Llama
from serving.models.native_llama import NativeLlama


def allocate_kv_cache(
    model: Llama | NativeLlama, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An empty cache [layers, 2, num_blocks, K, block_tokens, D] of this rank's heads.

    Its content is undefined: attention never reads a slot that was not written. On CPU it lies in huge
    pages, for blocks are read from all over it; those that nobody touches cost no memory.
    """
    shape = (model.spec.num_layers, 2, num_blocks, model.num_kv_heads, block_tokens, model.spec.head_dim)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(Arena().take((num_bytes,), np.uint8)).view(dtype).view(shape)


class ModelRunner:
    """Runs plans whose slots and block tables lie within `kv_cache`."""

    def __init__(self, model: Llama, kv_cache: torch.Tensor) -> None:
        self._model = model
        self._layer_caches = list(kv_cache)
        self._device = kv_cache.device

    @property
    def bytes_per_weight(self) -> float:
        """What a step reads for each of the model's weights."""
        return self._model.bytes_per_weight

    @torch.inference_mode()
    def hidden(self, plan: StepPlan) -> torch.Tensor:
        """Run `plan`'s tokens; returns hidden states [S, d] of the rows whose logits are wanted."""
        batch = plan_attention(
            plan.slot_mapping,
            plan.query_start,
            plan.context_lens,
            plan.block_tables,
            cache=self._layer_caches[0],
            dtype=self._model.dtype,
        )
        hidden = self._model.forward(
            torch.from_numpy(plan.token_ids).to(self._device),
            torch.from_numpy(plan.positions).to(self._device),
            self._layer_caches,
            batch,
        )
        return hidden.index_select(0, torch.from_numpy(plan.logits_rows).to(self._device))

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Run `plan`; returns its float32 logits [S, V]. Rank 0 only."""
        return self._model.logits(self.hidden(plan))

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, sampling: SamplingBatch) -> NDArray[np.int32]:
        """One token a row of logits [S, V], -1 where a row is not finite. Rank 0 only."""
        tokens: NDArray[np.int32] = sample(logits, sampling).cpu().numpy()
        return tokens
