"""A model's weights, moved out of the device's memory and back, for a replica that nobody needs now.

    park      device ══copy══► pinned host memory      the first time; they never change
              the storages shrink to nothing
    restore   the storages grow again, elsewhere; device ◄══copy══ pinned host memory

The tensors stay the same objects, so whoever holds one, or a view of it, need not know. Whatever keeps their
addresses, a captured graph above all, must be made anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch

from serving.engine.kv_transfer import Copier

_OURS = ("serving", "kernels")
_WORD_BYTES = 4


class ParkedWeights:
    """The weights of `model`. Where all are parked, nothing may compute with it."""

    def __init__(self, model: object, copier: Copier) -> None:
        self._copier = copier
        leaving = (tensor for tensor in tensors_of(model) if _can_leave(tensor))
        by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in leaving}
        self._weights = [_Weight(tensor) for tensor in by_storage.values()]

    @property
    def nbytes(self) -> int:
        """Of the device's memory while they are there; of the host's once they have been parked."""
        return sum(weight.nbytes for weight in self._weights)

    def park(self) -> None:
        """Give their memory back. What was launched before must be over."""
        for weight in self._weights:
            if weight.copy is None:
                weight.copy = self._copier.pinned(-(-weight.nbytes // _WORD_BYTES))
                self._copier.copy(weight.bytes(), _bytes(weight.copy)[: weight.nbytes])
        self._copier.mark().synchronize()
        for weight in self._weights:
            weight.storage.resize_(0)

    def restore(self) -> None:
        """Put the copies back into the stream; what is launched after computes with the weights again."""
        for weight in self._weights:
            assert weight.copy is not None, "they were parked"
            weight.storage.resize_(weight.nbytes)
            self._copier.copy(_bytes(weight.copy)[: weight.nbytes], weight.bytes())


class _Weight:
    """One storage, and its copy in pinned memory once there is one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.copy: torch.Tensor | None = None
        self._device = tensor.device

    def bytes(self) -> torch.Tensor:
        """All of it, uint8; not to be kept."""
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(self.storage)


def tensors_of(holder: object) -> Iterator[torch.Tensor]:
    """Every tensor that `holder`, an object of ours, holds: in attributes, in lists, in what they hold."""
    if isinstance(holder, torch.Tensor):
        yield holder
        return
    held: list[object] = []
    if isinstance(holder, list | tuple):
        held = list(holder)
    elif isinstance(holder, dict):
        held = list(holder.values())
    elif hasattr(holder, "__dict__") and type(holder).__module__.partition(".")[0] in _OURS:
        held = list(vars(holder).values())
    elif is_dataclass(holder) and not isinstance(holder, type):  # one with slots
        held = [getattr(holder, field.name) for field in fields(holder)]
    for part in held:
        yield from tensors_of(part)


def _can_leave(tensor: torch.Tensor) -> bool:
    """On a GPU all can; what is laid out for oneDNN, or lies in a file's memory, stays where it is."""
    return tensor.layout == torch.strided and tensor.untyped_storage().resizable()


def _bytes(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.uint8)
