"""The border between the engine's bookkeeping and its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.config import MockEngineConfig
from serving.engine.machine import Machine
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan
from serving.model_spec import ModelSpec

DTypeName = Literal["float32", "bfloat16", "float16", "int8", "int4", "float8"]
KvDTypeName = Literal["auto", "float8_e4m3"]

# On a GPU, where it is not the weights'; keys and values are activations.
_ACTIVATION_DTYPES: dict[str, str] = {"int8": "bfloat16", "int4": "bfloat16", "float8": "bfloat16"}


@dataclass(frozen=True)
class RandomWeights:
    """In place of files: drawn anew at every start, the same for the same seed and device kind."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """What a rank is told at its start.

    `kv_blocks` sets the pool's size; without it the pool takes measured free memory, at most
    `kv_memory_bytes` a rank (None: 1 GiB on CPU, no limit on CUDA). A rank keeps what is evicted from
    it in `host_kv_bytes` of host memory (None: nothing is kept). `rendezvous` is rank 0's
    "host:port", needed when `world_size` > 1.
    """

    weights: tuple[Path, ...] | RandomWeights
    spec: ModelSpec
    dtype: DTypeName = "float32"
    kv_dtype: KvDTypeName = "auto"  # float8_e4m3 rounds keys and values to it; beyond ±448 they are 448
    device: Literal["cpu", "cuda"] = "cpu"
    block_tokens: int = 16
    kv_blocks: int | None = None
    kv_memory_bytes: int | None = None
    host_kv_bytes: int | None = None
    max_step_tokens: int = 512  # the widest step: memory is kept for its activations
    max_num_seqs: int = 64  # and for the logits of so many sequences
    rank: int = 0
    world_size: int = 1
    rendezvous: str | None = None
    num_threads: int = 1
    sleeps: bool = False  # `sleep` may be called: host memory is kept for the weights
    mock: MockEngineConfig | None = None  # for `mock_executor` alone

    @property
    def activation_dtype(self) -> str:
        """In which a GPU computes; on a CPU the kernels have their own."""
        return _ACTIVATION_DTYPES.get(self.dtype, self.dtype)

    @property
    def kv_cache_dtype(self) -> str:
        """`kv_dtype`, with "auto" resolved."""
        return self.activation_dtype if self.kv_dtype == "auto" else self.kv_dtype


class Launched(Protocol):
    """A step that runs, or has run."""

    def tokens(self) -> NDArray[np.int32]:
        """[S] the token drawn of each wanted row, -1 where its logits were not finite; waits for them."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was over when its launch returned."""

    token_ids: NDArray[np.int32]

    def tokens(self) -> NDArray[np.int32]:
        return self.token_ids


class Executor(Protocol):
    """Runs a step on every rank. `Worker` is the real one, `MockExecutor` has no model; tests use a fake."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV pool, the same on every rank."""
        ...

    @property
    def num_host_blocks(self) -> int:
        """Blocks that host memory holds besides, the same on every rank; 0: there is no second tier."""
        ...

    @property
    def bytes_per_weight(self) -> float:
        """What a step reads of memory for each of the model's weights, on average."""
        ...

    def measure_machine(self) -> Machine:
        """What the machines of all ranks give together; may take some tenths of a second."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns while the step runs, so that the next is better launched behind it."""
        ...

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Launched:
        """Do `plan`'s copies, run the model and draw one token a wanted row, after all steps launched before.

        Where it runs ahead, a token id -1 - i in `plan` stands for the i-th one that the launch before draws.
        """
        ...

    def sleep(self, copies: BlockCopies) -> None:
        """Do `copies`, then give the device's memory back: weights, KV pool, all but the host's blocks.

        No step may be on its way; until `wake` none may come.
        """
        ...

    def wake(self) -> None:
        """Have it all again; the KV pool's content is undefined. Raises ConfigError where memory is gone."""
        ...

    def close(self) -> None:
        """End the other ranks and release memory."""
        ...
