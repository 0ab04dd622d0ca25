"""One tensor-parallel rank: loads its shard, sizes its KV pool, runs the steps rank 0 plans.

    rank 0:  launch(plan) ─ broadcast plan ─► run ─► sample ─► token ids
    others:  follow()     ◄─ broadcast plan ─  run   (until the stop message)

A message is int32 [_MESSAGE_INTS]: kind, length, then the plan's array; what does not fit follows in
a second broadcast. Between steps the others sleep in the first broadcast; rank 0's `keep_alive`
renews it before the group's timeout.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from kernels.cpu import library as native
from kernels.machine import measure
from serving.engine.cuda_device import CudaDevice
from serving.engine.cuda_runner import CudaRunner
from serving.engine.executor import Done, ExecutorOptions, Launched
from serving.engine.graph_buckets import StepLimits, graphs_bytes
from serving.engine.kv_sizing import (
    DEFAULT_CPU_KV_BYTES,
    KvSizing,
    RankMemory,
    check_can_sleep,
    check_can_wake,
    size_host_tier,
    size_pool,
    step_peak_bytes,
)
from serving.engine.kv_transfer import Copier, HostKv, PlainCopier, staging_bytes
from serving.engine.machine import Machine
from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.engine.native_runner import NativeRunner, NativeUpgrade, load_native, precision_of
from serving.engine.parked_weights import ParkedWeights
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan
from serving.engine.rank_dtypes import DTYPES, check_dtypes, weight_format, widening_bytes
from serving.engine.weight_source import source_of
from serving.errors import ConfigError
from serving.host import available_memory_bytes
from serving.models import ARCHITECTURES
from serving.models.layers import Shard
from serving.models.llama import Llama
from serving.models.native_llama import NativeLlama

logger = logging.getLogger(__name__)

_MESSAGE_INTS = 8192
_KEEP_ALIVE, _PLAN, _STOP, _SLEEP, _WAKE = range(5)
# A rank waits so long for a message or a sum; rank 0 keeps alive every minute at least.
_GROUP_TIMEOUT = timedelta(minutes=10)


class Worker:
    """A rank. Rank 0 is the engine's `Executor`; the others call `follow`.

    Constructing it blocks until every rank is there. Raises ConfigError when the model does not
    split over the ranks or the memory does not hold the KV pool, ModelFileError when the weights
    cannot be read. One thread at a time may call it.
    """

    def __init__(self, options: ExecutorOptions) -> None:
        _check_split(options)
        check_dtypes(options)
        self._options = options
        torch.set_num_threads(options.num_threads)
        self._rank, self._world_size = options.rank, options.world_size
        self._device = torch.device(options.device)
        self.kv_dtype = options.kv_cache_dtype
        self._tensor_group = _join(options) if options.world_size > 1 else None
        shard = Shard(options.rank, options.world_size, self._all_reduce)
        value_bytes = DTYPES[self.kv_dtype].itemsize
        self.block_bytes = (
            options.block_tokens * options.spec.kv_bytes_per_token(value_bytes) // options.world_size
        )
        self._dtype = options.dtype if options.device == "cpu" else options.activation_dtype
        self._ranks_here = self._ranks_on_this_machine()
        precision = None if options.sleeps else precision_of(options)  # its weights cannot be moved
        library = native.cached() if precision is not None else None
        if not self._least(int(library is not None)):  # on all ranks or on none: they sum one dtype
            library = None
        model: Llama | NativeLlama
        if library is None or precision is None:
            model = self._load(options, shard)
        else:
            model = load_native(options, precision, shard, library)
        host_bytes = self._least(available_memory_bytes() // self._ranks_here)
        self.num_host_blocks = size_host_tier(options.host_kv_bytes, self.block_bytes, host_bytes)
        self.kv_sizing = self._size_pool(options)
        self._model = model
        self._host_kv: HostKv | None = None
        self._upgrade: NativeUpgrade | None = None
        self._runner: ModelRunner | NativeRunner | CudaRunner
        kv_cache = self._settle()
        if isinstance(self._runner, ModelRunner) and precision is not None:
            self._upgrade = NativeUpgrade(options, precision, kv_cache)
        self._parked: ParkedWeights | None = None
        if options.sleeps:
            self._parked = ParkedWeights(model, self._copier())
            check_can_sleep(self._parked.nbytes, host_bytes - self.num_host_blocks * self.block_bytes)

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV pool, the same on every rank."""
        return self.kv_sizing.num_blocks

    @property
    def bytes_per_weight(self) -> float:
        """As they lie in memory now."""
        return self._runner.bytes_per_weight

    def measure_machine(self) -> Machine:
        """What all ranks can do together, were each like this one; some tenths of a second."""
        flops_per_s, bytes_per_s = measure(self._dtype, self._device.type)
        nodes = self._world_size / self._ranks_here  # ranks on one machine share its memory
        return Machine(flops_per_s * self._world_size, bytes_per_s * nodes)

    @property
    def runs_ahead(self) -> bool:
        """A GPU does; on a CPU the step itself would wait for the host's work."""
        return isinstance(self._runner, CudaRunner)

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Launched:
        """Run `plan` on every rank and draw one token a wanted row; a GPU does so while this returns."""
        if self._world_size > 1:
            self._send(_PLAN, plan.pack())
        self._move_blocks(plan.copies)
        if self._upgrade is not None and self._upgrade.is_over:
            self._runner = self._upgrade.take() or self._runner
            self._upgrade = None
        if isinstance(self._runner, CudaRunner):
            return self._runner.launch(plan, sampling)
        with torch.inference_mode():
            return Done(self._runner.draw(self._runner.logits(plan), sampling))

    def follow(self) -> None:
        """Run what rank 0 plans until it stops. Raises RuntimeError when rank 0 dies."""
        while (message := self._receive())[0] != _STOP:
            kind, payload = message
            if kind == _PLAN:
                plan = StepPlan.unpack(payload)
                self._move_blocks(plan.copies)
                run = self._runner.follow if isinstance(self._runner, CudaRunner) else self._runner.hidden
                run(plan)
            elif kind == _SLEEP:
                self._fall_asleep(BlockCopies.unpack(payload))
            elif kind == _WAKE:
                self._wake_up()

    def sleep(self, copies: BlockCopies) -> None:
        """Do `copies` on every rank, then give back the devices' memory but for what `wake` needs."""
        self._send(_SLEEP, copies.pack())
        self._fall_asleep(copies)

    def wake(self) -> None:
        """Weights and an empty KV pool on every rank again. Raises ConfigError where memory is gone."""
        self._send(_WAKE, np.empty(0, dtype=np.int32))
        self._wake_up()

    def keep_alive(self) -> None:
        """Rank 0 calls this at least once a minute while it has nothing to run."""
        self._send(_KEEP_ALIVE, np.empty(0, dtype=np.int32))

    def close(self) -> None:
        """Stop the other ranks (where they still live) and leave the group."""
        if self._world_size == 1 or not dist.is_initialized():
            return
        if self._rank == 0:
            with contextlib.suppress(RuntimeError):  # a rank that is gone needs no stop
                self._send(_STOP, np.empty(0, dtype=np.int32))
        # The group's threads end with its last reference: here, not while the interpreter shuts down.
        self._tensor_group = None
        dist.destroy_process_group()

    def _settle(self) -> torch.Tensor:
        """A KV pool, and the runner that runs the model over it. Returns the pool."""
        options, dummies = self._options, int(self._device.type == "cuda")
        kv_cache = allocate_kv_cache(
            self._model, self.num_blocks + dummies, options.block_tokens, DTYPES[self.kv_dtype], self._device
        )
        if self._host_kv is not None:
            self._host_kv.attach(kv_cache)
        elif self.num_host_blocks:
            self._host_kv = HostKv(kv_cache, self.num_host_blocks, self._copier())
        if isinstance(self._model, NativeLlama):
            self._model.attach(kv_cache, options.num_threads)
            self._runner = NativeRunner(self._model)
        elif self._device.type == "cuda":
            device, share = CudaDevice(self._device), self._share_drawn if options.world_size > 1 else None
            self._runner = CudaRunner(self._model, kv_cache, self._limits(options), device, share)
        else:
            self._runner = ModelRunner(self._model, kv_cache)
        return kv_cache

    def _copier(self) -> Copier:
        return CudaDevice(self._device) if self._device.type == "cuda" else PlainCopier()

    def _fall_asleep(self, copies: BlockCopies) -> None:
        assert self._parked is not None, "options.sleeps"
        self._move_blocks(copies)
        if self._host_kv is not None:
            self._host_kv.detach()
        self._parked.park()  # waits for the copies too
        del self._runner
        gc.collect()  # the runner and its graphs hold each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info("asleep: weights of %.0f MiB are in host memory", self._parked.nbytes / 2**20)

    def _wake_up(self) -> None:
        assert self._parked is not None, "options.sleeps"
        kv_bytes = self.num_blocks * self.block_bytes
        needed = self._parked.nbytes, kv_bytes, self.kv_sizing.memory.step_bytes
        check_can_wake(self._free_bytes(), *needed)
        self._parked.restore()
        self._settle()
        logger.info("awake")

    def _move_blocks(self, copies: BlockCopies) -> None:
        if self._host_kv is not None:
            self._host_kv.run(copies)

    def _load(self, options: ExecutorOptions, shard: Shard) -> Llama:
        """The model on torch's kernels.

        On CPU always in float32: few CPUs are faster in 16 bits without the native library, and none is
        nearer to the model.
        """
        dtype = torch.float32 if options.device == "cpu" else DTYPES[options.activation_dtype]
        source = source_of(options, dtype, self._device)
        load = ARCHITECTURES[options.spec.architecture]
        return load(options.spec, source, self._device, shard, weight_format(options))

    def _send(self, kind: int, payload: NDArray[np.int32]) -> None:
        if self._world_size == 1:
            return
        first = np.zeros(_MESSAGE_INTS, dtype=np.int32)
        first[:2] = kind, len(payload)
        head, tail = payload[: _MESSAGE_INTS - 2], payload[_MESSAGE_INTS - 2 :]
        first[2 : 2 + len(head)] = head
        dist.broadcast(torch.from_numpy(first), src=0)
        if len(tail):
            dist.broadcast(torch.from_numpy(tail), src=0)

    def _receive(self) -> tuple[int, NDArray[np.int32]]:
        first = torch.empty(_MESSAGE_INTS, dtype=torch.int32)
        dist.broadcast(first, src=0)
        kind, length = first[:2].tolist()
        head = first[2 : 2 + length]
        if length > len(head):
            tail = torch.empty(length - len(head), dtype=torch.int32)
            dist.broadcast(tail, src=0)
            head = torch.cat((head, tail))
        return kind, head.numpy()

    def _all_reduce(self, partial: torch.Tensor) -> None:
        if self._tensor_group is not None:
            dist.all_reduce(partial, group=self._tensor_group)

    def _share_drawn(self, tokens: torch.Tensor) -> None:
        dist.broadcast(tokens, src=0, group=self._tensor_group)

    def _size_pool(self, options: ExecutorOptions) -> KvSizing:
        """Every rank's pool; the same answer, or ConfigError, on each."""
        limit = options.kv_memory_bytes
        if limit is None and self._device.type == "cpu":
            limit = DEFAULT_CPU_KV_BYTES
        activations, logits = step_peak_bytes(options.spec, options.max_step_tokens, options.max_num_seqs)
        activations += widening_bytes(options)
        free_bytes, staging = self._free_bytes(), 0
        if self.num_host_blocks:
            staging = staging_bytes(self.block_bytes, self.num_host_blocks)
            if self._device.type == "cpu":  # both tiers lie in the same memory
                free_bytes -= self.num_host_blocks * self.block_bytes
        memory = RankMemory(
            free_bytes=free_bytes,
            activation_bytes=activations,
            logits_bytes=logits,
            graphs_bytes=self._graphs_bytes(options),
            staging_bytes=staging,
            host_blocks=self.num_host_blocks,
            block_bytes=self.block_bytes,
            kv_blocks=options.kv_blocks,
            limit_bytes=limit,
        )
        return size_pool(memory, self._least(memory.fitting_blocks))

    def _limits(self, options: ExecutorOptions) -> StepLimits:
        return StepLimits(
            options.max_num_seqs, options.spec.context_tokens, self.num_blocks, options.block_tokens
        )

    def _graphs_bytes(self, options: ExecutorOptions) -> int:
        if self._device.type != "cuda":
            return 0
        return graphs_bytes(options.spec, options.max_num_seqs, self.block_bytes)

    def _free_bytes(self) -> int:
        """Memory this rank may use: the GPU's, or its share of the machine's."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # loading leaves some with torch's allocator
            return torch.cuda.mem_get_info(self._device)[0]
        return available_memory_bytes() // self._ranks_here

    def _ranks_on_this_machine(self) -> int:
        if self._world_size == 1:
            return 1
        own = torch.tensor(zlib.crc32(socket.gethostname().encode()))
        everyone = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(everyone, own)
        return sum(bool(other == own) for other in everyone)

    def _least(self, number: int) -> int:
        if self._world_size == 1:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)


def _check_split(options: ExecutorOptions) -> None:
    sizes = options.spec.tensor_parallel_sizes()
    if options.world_size not in sizes:
        raise ConfigError(
            f"tensor_parallel {options.world_size}: this model has {options.spec.num_heads} query and "
            f"{options.spec.num_kv_heads} KV heads; it splits over {' or '.join(map(str, sizes))} ranks"
        )
    if options.world_size > 1 and options.rendezvous is None:
        raise ConfigError("rendezvous: several ranks need rank 0's host:port")


def _join(options: ExecutorOptions) -> dist.ProcessGroup | None:
    """Join the ranks; plans travel over gloo. Returns the group that sums tensors."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{options.rendezvous}",
        rank=options.rank,
        world_size=options.world_size,
        timeout=_GROUP_TIMEOUT,
    )
    if options.device == "cuda":
        group = dist.new_group(backend="nccl", timeout=_GROUP_TIMEOUT)
        # NCCL takes its buffers with the first sum: before memory is measured, and before any capture.
        dist.all_reduce(torch.zeros(1, device=options.device), group=group)
        return group
    return dist.group.WORLD
