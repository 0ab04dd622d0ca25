"""A decoder's linear layers, fused and cut for one rank of a tensor-parallel group.

Column-parallel (qkv, gate_up): a rank holds some of the output rows, whole heads for attention.
Row-parallel (o, down): a rank holds the matching input columns, and the ranks' partial products are
summed by `Shard.all_reduce` (Shoeybi et al. 2019, Megatron-LM, section 3). Shards are cut as they
are read, so a rank never holds another's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.linear import PackedWeight, WeightFormat, linear, pack_weight
from serving.model_spec import ModelSpec
from serving.models.weights import ALL, TensorSource


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor-parallel group; `all_reduce` sums a tensor over ranks, in place."""

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[torch.Tensor], None] = lambda partial: None

    def part(self, size: int) -> slice:
        """This rank's part of a dimension; `size` must divide by the number of ranks."""
        assert size % self.world_size == 0, f"{size} does not split over {self.world_size} ranks"
        each = size // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class ColumnParallel:
    """Fused projections whose outputs lie side by side: x [T, in] -> [T, sum of this rank's rows]."""

    weight: PackedWeight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


@dataclass(frozen=True)
class RowParallel:
    """A projection of this rank's inputs, summed over ranks: x [T, in / ranks] -> [T, out]."""

    weight: PackedWeight
    shard: Shard

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x, self.weight)
        self.shard.all_reduce(out)
        return out


@dataclass(frozen=True)
class Loader:
    """Reads one rank's part of a model; what the layers multiply with is kept in `weight_format`."""

    spec: ModelSpec
    source: TensorSource
    device: torch.device
    shard: Shard
    weight_format: WeightFormat = "plain"

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor that every rank holds."""
        return self.source.tensor(name, shape).to(self.device)

    def stacked(self, names: tuple[str, ...], rows: tuple[int, ...], columns: int) -> torch.Tensor:
        """This rank's rows of matrices `names`, of `rows` outputs each, below one another."""
        parts = [
            self.source.tensor(name, (size, columns), rows=self.shard.part(size))
            for name, size in zip(names, rows, strict=True)
        ]
        return torch.cat([part.to(self.device) for part in parts])  # a GPU joins them in no time

    def some_columns(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """This rank's columns of a matrix."""
        part = self.source.tensor(name, (rows, columns), rows=ALL, columns=self.shard.part(columns))
        return part.to(self.device)

    def column_parallel(self, names: tuple[str, ...], rows: tuple[int, ...], columns: int) -> ColumnParallel:
        """The matrices `names`, of `rows` outputs each and `columns` inputs."""
        return ColumnParallel(pack_weight(self.stacked(names, rows, columns), self.weight_format))

    def row_parallel(self, name: str, rows: int, columns: int) -> RowParallel:
        """The matrix `name`, of `rows` outputs and `columns` inputs."""
        return RowParallel(
            pack_weight(self.some_columns(name, rows, columns), self.weight_format), self.shard
        )
