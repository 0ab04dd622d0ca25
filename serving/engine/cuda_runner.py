"""One rank's model on a GPU: a step's plan in, its tokens out later; decodes from CUDA graphs.

    launch(N)     pack ─► pinned ══copy══► inputs ─► forward, draw ─► drawn ══copy══► pinned
    launch(N+1)         pack ─► pinned ══copy══► inputs ─► ...          ▲ reads what N drew
    N.tokens()    waits for N alone

`launch` waits for no step but the one before the last: one copy brings a step to the device, one brings
its tokens back. What a step draws also stays on the device, so the step right after it need not know it:
there a token id of -1 - i stands for the i-th one. Other ranks get it from rank 0, which alone draws.

Steps of one new token a sequence are padded to a bucket (`graph_buckets`). The first step of a bucket
runs eagerly on the graph's own buffers, which compiles its kernels and costs what any eager step does;
the second captures the graph, which costs the host as much again and leaves the GPU idle meanwhile; from
then on a step is one replay. So starting is not held up by graphs that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.attention_worklist import BatchCapacity, GpuAttentionBatch
from kernels.paged_attention import AttentionBatch
from kernels.sampling import SamplingControls, sample
from serving.engine.cuda_device import Device, Graph, Moment
from serving.engine.graph_buckets import (
    Bucket,
    DeviceStep,
    Draw,
    StepLayout,
    StepLimits,
    bucket_for,
    device_step,
    graph_layout,
    pack,
    pad,
)
from serving.engine.plan import Ints, SamplingBatch, StepPlan
from serving.models.llama import Llama

ViewAttention = Callable[[torch.Tensor, BatchCapacity], AttentionBatch]

# The host packs one step while the one before may still be on its way.
_FLIGHTS = 2


class Pending:
    """A launched step's tokens. They may be asked for at any time, and more than once."""

    def __init__(self, done: Moment, drawn: torch.Tensor, rows: Ints) -> None:
        self._done = done
        self._drawn = drawn
        self._rows = rows
        self._tokens: Ints | None = None

    def tokens(self) -> Ints:
        """[S] token ids, -1 where logits were not finite; waits until they are here."""
        if self._tokens is None:
            self._done.synchronize()
            self._tokens = self._drawn.numpy()[self._rows]  # a copy: what it lies in is used again
        return self._tokens


class CudaRunner:
    """Runs plans whose slots and block tables lie within `limits.num_blocks` of `kv_cache`.

    The cache has one block more, the dummy. `share` gives rank 0's tensor to all ranks, where there are
    others. One thread at a time may call it.
    """

    def __init__(
        self,
        model: Llama,
        kv_cache: torch.Tensor,
        limits: StepLimits,
        device: Device,
        share: Callable[[torch.Tensor], None] | None = None,
        view_attention: ViewAttention = GpuAttentionBatch.view,
    ) -> None:
        assert kv_cache.shape[2] == limits.num_blocks + 1, "the last block is the dummy"
        self._model = model
        self._layer_caches = list(kv_cache)
        self._limits = limits
        self._device = device
        self._view_attention = view_attention
        self._share = share
        self._drawn = device.ints(limits.max_num_seqs)
        self._drawn_rows = np.empty(0, dtype=np.int32)  # where in it the i-th token of the last step lies
        self._graphs: dict[Bucket, _BucketGraph] = {}
        self._flights = [_Flight(device, limits.max_num_seqs) for _ in range(_FLIGHTS)]
        self._num_launched = 0

    @property
    def bytes_per_weight(self) -> float:
        """What a step reads for each of the model's weights."""
        return self._model.bytes_per_weight

    @torch.inference_mode()
    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Pending:
        """Start `plan`; rank 0 only. Raises ValueError where more rows draw than `max_num_seqs`."""
        wanted = len(plan.logits_rows)
        if wanted > self._limits.max_num_seqs:
            raise ValueError(f"{wanted} rows draw tokens, max_num_seqs is {self._limits.max_num_seqs}")
        return self._launch(device_step(plan, sampling, self._drawn_rows, self._limits), plan.logits_rows)

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Start this rank's part of `plan` where it is not rank 0, which alone draws."""
        undrawn = replace(plan, logits_rows=np.empty(0, dtype=np.int32))
        step = device_step(undrawn, _NO_SAMPLING, self._drawn_rows, self._limits)
        self._launch(step, plan.logits_rows)

    def _launch(self, step: DeviceStep, logits_rows: Ints) -> Pending:
        """`logits_rows` are those that rank 0 draws for."""
        flight = self._flights[self._num_launched % _FLIGHTS]
        self._num_launched += 1
        flight.land()
        bucket = bucket_for(step, self._limits)
        if bucket is None:
            attention, layout = pack(step)
            inputs = self._device.ints(layout.ints)
            flight.send(layout, attention, step, inputs)
            self._device.run(self._work(inputs, layout, step.draw))
            self._drawn_rows = np.arange(len(logits_rows), dtype=np.int32)
        else:
            graph = self._graphs.get(bucket) or self._make_graph(bucket)
            padded = pad(step, bucket, self._limits)
            attention, layout = pack(padded, graph.layout)
            flight.send(layout, attention, padded, graph.inputs)
            graph.launch()
            self._drawn_rows = logits_rows
        return flight.fetch(self._drawn, self._drawn_rows[: len(step.plan.logits_rows)])

    def _make_graph(self, bucket: Bucket) -> _BucketGraph:
        layout = graph_layout(bucket, self._limits)
        inputs = self._device.ints(layout.ints)
        work = self._work(inputs, layout, bucket.draw)
        return self._graphs.setdefault(bucket, _BucketGraph(self._device, layout, inputs, work))

    def _work(self, array: torch.Tensor, layout: StepLayout, draw: Draw) -> Callable[[], None]:
        """Forward and draw, from what `array` holds when it runs."""
        inputs = _Inputs.view(array, layout, draw, self._view_attention)

        def work() -> None:
            tokens = self._forward(inputs)
            if tokens is not None:
                self._drawn[: layout.rows].copy_(tokens)
            if self._share is not None:
                self._share(self._drawn)

        return work

    def _forward(self, inputs: _Inputs) -> torch.Tensor | None:
        ids = inputs.token_ids
        # A row whose logits were not finite has drawn -1: it runs on as token 0, and nobody will listen.
        known = self._drawn.index_select(0, ids.bitwise_not().clamp_(min=0)).clamp_(min=0)
        hidden = self._model.forward(
            torch.where(ids < 0, known, ids), inputs.positions, self._layer_caches, inputs.attention
        )
        wanted = len(inputs.logits_rows)
        if wanted == 0:
            return None
        if wanted < len(hidden):
            hidden = hidden.index_select(0, inputs.logits_rows)
        return sample(self._model.logits(hidden), inputs.controls)


_NO_SAMPLING = SamplingBatch(
    temperature=np.empty(0, dtype=np.float32),
    top_k=np.empty(0, dtype=np.int32),
    top_p=np.empty(0, dtype=np.float32),
    min_p=np.empty(0, dtype=np.float32),
    seed=np.empty(0, dtype=np.uint64),
    position=np.empty(0, dtype=np.int32),
)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """Views of a step's array on the device; the parts of `StepLayout`."""

    attention: AttentionBatch
    token_ids: torch.Tensor
    positions: torch.Tensor
    logits_rows: torch.Tensor
    controls: SamplingControls

    @classmethod
    def view(
        cls, array: torch.Tensor, layout: StepLayout, draw: Draw, view_attention: ViewAttention
    ) -> _Inputs:
        attention, *parts = (array[place] for place in layout.places())
        token_ids, positions, logits_rows, temperature, top_k, top_p, min_p, position, seed = parts
        controls = SamplingControls(
            temperature=temperature.view(torch.float32),
            top_k=top_k,
            top_p=top_p.view(torch.float32),
            min_p=min_p.view(torch.float32),
            seed=seed.view(torch.int64),
            position=position,
            is_greedy=draw == "greedy",
        )
        batch = view_attention(attention, layout.attention)
        return cls(batch, token_ids, positions, logits_rows, controls)


@dataclass(eq=False)
class _BucketGraph:
    """A bucket's buffers and work; the graph once it has been wanted twice."""

    device: Device
    layout: StepLayout
    inputs: torch.Tensor
    work: Callable[[], None]
    _graph: Graph | None = field(default=None, init=False)
    _has_run: bool = field(default=False, init=False)

    def launch(self) -> None:
        if not self._has_run:
            self.device.run(self.work)
            self._has_run = True
            return
        if self._graph is None:
            self._graph = self.device.capture(self.work)
        self._graph.replay()


class _Flight:
    """Pinned memory of one step on its way: its array there, its tokens back."""

    def __init__(self, device: Device, max_num_seqs: int) -> None:
        self._device = device
        self._there = device.pinned(1)
        self._back = device.pinned(max_num_seqs)
        self._pending: Pending | None = None

    def land(self) -> None:
        """Wait until the step before is done with this memory, and keep its tokens for who will ask."""
        if self._pending is not None:
            self._pending.tokens()
            self._pending = None

    def send(self, layout: StepLayout, attention: Ints, step: DeviceStep, inputs: torch.Tensor) -> None:
        if len(self._there) < layout.ints:  # to pin memory is slow: it happens a few times
            self._there = self._device.pinned(2 * layout.ints)
        there = self._there[: layout.ints]
        layout.write(there.numpy(), attention, step)
        self._device.copy(there, inputs)

    def fetch(self, drawn: torch.Tensor, rows: Ints) -> Pending:
        """`rows` of what was drawn."""
        count = int(rows.max(initial=-1)) + 1
        if count:
            self._device.copy(drawn[:count], self._back[:count])
        self._pending = Pending(self._device.mark(), self._back, rows)
        return self._pending
