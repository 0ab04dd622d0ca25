"""What a replica's machine can do, as the roofline model needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resource = Literal["memory", "compute"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a replica's ranks can do together. The default is two laptop cores.

    `kernels.machine.measure` says what this machine really does.
    """

    flops_per_s: float = 1e11
    bytes_per_s: float = 2e10
    step_overhead_ms: float = 1.0

    @property
    def ridge_flop_per_byte(self) -> float:
        """The arithmetic intensity at which memory and compute take equally long."""
        return self.flops_per_s / self.bytes_per_s

    def floor_ms(self, flops: float, bytes_moved: float) -> float:
        """The least a step of such sizes can take: the slower of its two resources."""
        return 1e3 * max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)

    def bound(self, flops: float, bytes_moved: float) -> Resource:
        """Which of the two that is."""
        return "compute" if flops > self.ridge_flop_per_byte * bytes_moved else "memory"
