"""The one rule: an op's Triton kernel where the tensor is on CUDA and the op has one, else torch.

Tests override it with `forced("torch")` or `forced("triton")`; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch

Backend = Literal["torch", "triton"]
Op = TypeVar("Op", bound=Callable[..., Any])

_forced: ContextVar[Backend | None] = ContextVar("forced_backend", default=None)


def choose(like: torch.Tensor, torch_op: Op, triton_op: Op | None = None) -> Op:
    """The implementation to call for tensors that live where `like` does."""
    if triton_op is None:
        return torch_op
    backend = _forced.get() or ("triton" if like.is_cuda else "torch")
    return triton_op if backend == "triton" else torch_op


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Within the block, every op that has both paths takes `backend`."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
