"""What the attention kernels are compiled for: shapes, dtypes, and the cases shipped of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_DIMS = (128, 64, 80, 96, 256)  # the commonest first
INT32_MAX = 2**31 - 1

# Capabilities from which a configuration holds: what runs on 80 has to fit the 99 KiB of a block on 86, 89
# and 120, too.
OLDEST = (80, 90)


_REGISTERS = 65536  # of a multiprocessor; a warp's threads get them 8 at a time
_MOST_REGISTERS = 255  # of a thread


def padded(head_dim: int) -> int:
    """The head dim of a tile, a power of two."""
    return max(64, 1 << (head_dim - 1).bit_length())


def oldest_for(capability: int) -> int:
    """Whose configurations a GPU takes: consumer Blackwell (120) has an SM like 80's, not like 90's."""
    return 90 if 90 <= capability < 120 else 80


def max_registers(programs: int, num_warps: int) -> int:
    """Of a thread, for so many programs to share a multiprocessor."""
    return min(_REGISTERS // (32 * num_warps * programs) // 8 * 8, _MOST_REGISTERS)


@dataclass(frozen=True)
class Case:
    """One set of the types and switches that both kernels are compiled for."""

    oldest: int
    head_dim: int
    dtype: str
    cache_dtype: str
    has_window: bool = False
    wide: bool = False
    group: int = 4  # query heads to a key/value head

    @property
    def cache_bytes(self) -> int:
        """Of a number."""
        return 1 if self.cache_dtype == "fp8e4nv" else 2

    def name(self, kernel: str) -> str:
        switches = f"{' window' if self.has_window else ''}{' wide' if self.wide else ''}"
        switches += f" G={self.group}" if self.group != 4 else ""
        return f"{kernel} sm_{self.oldest} D={self.head_dim} {self.dtype} cache={self.cache_dtype}{switches}"

    @property
    def constants(self) -> dict[str, object]:
        """The switches, as the kernels' arguments."""
        return {"HAS_WINDOW": self.has_window, "WIDE": self.wide}


def cases() -> Iterator[Case]:
    """Every head dim, in both dtypes, and with a window; at each width of a tile an e4m3 cache, with a
    window and without; of the commonest a huge cache, and groups of heads that are no power of two."""
    for oldest, head_dim in itertools.product(OLDEST, HEAD_DIMS):
        yield Case(oldest, head_dim, "bf16", "bf16")
        yield Case(oldest, head_dim, "fp16", "fp16")
        yield Case(oldest, head_dim, "bf16", "bf16", has_window=True)
    for oldest in OLDEST:
        yield Case(oldest, 128, "bf16", "bf16", wide=True)
        for group in (1, 7):
            yield Case(oldest, 128, "bf16", "bf16", group=group)
    for head_dim, has_window in itertools.product((64, 128, 256), (False, True)):
        yield Case(90, head_dim, "bf16", "fp8e4nv", has_window=has_window)
