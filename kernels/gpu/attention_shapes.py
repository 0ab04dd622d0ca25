"""What the attention kernels are compiled for: shapes, dtypes, and the cases shipped of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_DIMS = (64, 80, 96, 128, 256)
INT32_MAX = 2**31 - 1

# Capabilities from which a configuration holds: what runs on 80 has to fit the 99 KiB of a block on 86, 89
# and 120, too.
OLDEST = (80, 90)


def padded(head_dim: int) -> int:
    """The head dim of a tile, a power of two."""
    return max(64, 1 << (head_dim - 1).bit_length())


def oldest_for(capability: int) -> int:
    """Whose configurations a GPU takes: consumer Blackwell (120) has an SM like 80's, not like 90's."""
    return 90 if 90 <= capability < 120 else 80


@dataclass(frozen=True)
class Case:
    """One set of the types and switches that both kernels are compiled for."""

    oldest: int
    head_dim: int
    dtype: str
    cache_dtype: str
    has_window: bool = False
    wide: bool = False

    @property
    def cache_bytes(self) -> int:
        """Of a number."""
        return 1 if self.cache_dtype == "fp8e4nv" else 2

    def name(self, kernel: str) -> str:
        switches = f"{' window' if self.has_window else ''}{' wide' if self.wide else ''}"
        return f"{kernel} sm_{self.oldest} D={self.head_dim} {self.dtype} cache={self.cache_dtype}{switches}"

    @property
    def constants(self) -> dict[str, object]:
        """The switches, as the kernels' arguments."""
        return {"HAS_WINDOW": self.has_window, "WIDE": self.wide}


def cases() -> Iterator[Case]:
    """Every head dim and dtype; of the commonest of them a window, a huge cache and, at each
    width of a tile, an e4m3 cache."""
    for oldest, head_dim, dtype in itertools.product(OLDEST, HEAD_DIMS, ("bf16", "fp16")):
        yield Case(oldest, head_dim, dtype, dtype)
    for oldest in OLDEST:
        yield Case(oldest, 128, "bf16", "bf16", has_window=True)
        yield Case(oldest, 128, "bf16", "bf16", wide=True)
    for head_dim in (64, 128, 256):
        yield Case(90, head_dim, "bf16", "fp8e4nv")
