"""One op at one shape: what to run, what it should give, what it moves and computes, and who else can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Run = Callable[[], torch.Tensor]
Bound = Literal["memory", "bf16", "fp8"]
"""The ceiling that a case is held against: bytes a second, or operations a second in this dtype."""


@dataclass(frozen=True)
class Place:
    """Where and how large: `tiny` is for the interpreter, whose float16 is right and bfloat16 is not."""

    device: str
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.float16 if self.tiny else torch.bfloat16

    def randn(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers in `dtype`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Peer:
    """The same result by a library. `captures`: into a CUDA graph; `cpu`: it runs in a rehearsal too."""

    name: str
    run: Callable[[], object]
    captures: bool = True
    cpu: bool = True


@dataclass(frozen=True)
class Case:
    """`expected` is float64, of all that `run` returns, or of the rows (first dimension) in `rows`.

    `moved_bytes` and `flops` are the least that the op needs. `tolerance` is of the largest absolute
    difference over the largest absolute value.
    """

    shape: str
    run: Run
    expected: Run
    moved_bytes: int
    flops: int
    bound: Bound
    tolerance: float
    peers: tuple[Peer, ...] = ()
    rows: torch.Tensor | None = None


def nbytes(*tensors: torch.Tensor) -> int:
    """Of all of them."""
    return sum(tensor.nbytes for tensor in tensors)
