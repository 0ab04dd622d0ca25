"""The one rule: an op's GPU kernel where the tensor is on CUDA and the op has one, else torch.

A kernel is named "module:function" and imported when it is first used, so that a machine without a GPU
never loads a compiler. Tests override the rule with `forced("torch")` or `forced("triton")`; nothing else
does.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

import torch

Backend = Literal["torch", "triton"]
Op = TypeVar("Op", bound=Callable[..., Any])

_forced: ContextVar[Backend | None] = ContextVar("forced_backend", default=None)


def choose(like: torch.Tensor, torch_op: Op, gpu: str | None = None) -> Op:
    """The implementation to call for tensors that live where `like` does.

    `gpu` is "module:function", a function of `torch_op`'s signature, or None where there is no kernel.
    """
    if gpu is None:
        return torch_op
    backend = _forced.get() or ("triton" if like.is_cuda else "torch")
    return cast(Op, _resolve(gpu)) if backend == "triton" else torch_op


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Within the block, every op that has both paths takes `backend`."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved
