"""What a launcher asks of the GPU it launches on; answered in the interpreter too."""

from __future__ import annotations

import functools

import torch
from triton.errors import TritonError

# What a launch raises besides RuntimeError: the compiler's refusal, or too little of the GPU for it.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (TritonError,)

_INTERPRETED_CAPABILITY = 90
_INTERPRETED_MULTIPROCESSORS = 1  # few programs, so that each takes several work items


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return _INTERPRETED_CAPABILITY
    major, minor = _capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return _multiprocessors(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
