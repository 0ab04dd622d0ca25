"""A mixture of experts in four launches: the sort, gate and up with SwiGLU, down, and the sum.

A program multiplies a tile of one expert's pairs with a tile of its outputs. Hidden rows and results are
kept by pair, not by place in the sort: what fills tiles up is never stored, and a token's k results lie
side by side, to be added in the order of its experts. No sum depends on timing. What changes from step to
step is not specialised on, so that traffic never waits for the compiler.

    M rows of a tile of pairs, N outputs, K inputs; P, T, k, E, d, f as in kernels.moe
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels import moe
from kernels.gpu.variants import Variant
from kernels.moe import ExpertTiles, ExpertWeights, tile_capacity

_SUM_WIDTH = 1024
_SUM_WARPS = 4
# One program sorts so many pairs faster than the library's dozen launches; it takes _SORT_CHUNK at a time.
_SORT_PAIRS = 512
_SORT_CHUNK = 32
_SORT_WARPS = 4
_GROUP_TILES = 8
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Config:
    """A tile of pairs, outputs and inputs, with the warps and the loads in flight that work on it.

    `rows_an_expert`: for up to so many pairs an expert, on average.
    """

    rows_an_expert: float
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Few rows: as many weights in flight as fit. Many: square tiles for the tensor cores.
_GATE_UP = (
    Config(16, 16, 64, 128, 4, 3),
    Config(64, 64, 64, 64, 4, 3),
    Config(float("inf"), 128, 64, 64, 8, 3),
)
_DOWN = (
    Config(16, 16, 64, 128, 4, 4),
    Config(64, 64, 128, 64, 4, 3),
    Config(float("inf"), 128, 128, 64, 8, 3),
)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    chosen, pairs, tile_experts, num_pairs, capacity,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`kernels.moe.sort_into_tiles` by counting, in one program."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    at = tl.arange(0, CHUNK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        mine = tl.load(chosen + start + at, mask=start + at < num_pairs, other=-1).to(tl.int32)
        counts += tl.sum((mine[:, None] == expert).to(tl.int32), axis=0)
    filled = (counts + ROWS - 1) // ROWS * ROWS
    ends = tl.cumsum(filled, axis=0)
    used = tl.sum(filled, axis=0)
    for start in range(0, capacity // ROWS, CHUNK):
        first = (start + at) * ROWS
        owner = tl.sum((ends[None, :] <= first[:, None]).to(tl.int32), axis=1)
        tl.store(tile_experts + start + at, tl.where(first < used, owner, -1), mask=first < capacity)
    for start in range(0, capacity, CHUNK):
        none = tl.zeros((CHUNK,), tl.int32) + num_pairs
        tl.store(pairs + start + at, none, mask=start + at < capacity)
    tl.debug_barrier()  # what follows overwrites part of this, from other threads
    place = ends - filled
    for start in range(0, num_pairs, CHUNK):
        mine = tl.load(chosen + start + at, mask=start + at < num_pairs, other=-1).to(tl.int32)
        is_of = (mine[:, None] == expert).to(tl.int32)
        earlier = tl.cumsum(is_of, axis=0) - is_of
        own = tl.sum(is_of * (place[None, :] + earlier), axis=1)
        tl.store(pairs + own, start + at, mask=start + at < num_pairs)
        place += tl.sum(is_of, axis=0)


@triton.jit
def _tile_of(num_tiles, num_columns, GROUP: tl.constexpr):
    """(tile of pairs, tile of outputs) of this program; GROUP tiles of pairs share weights in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _gate_up_kernel(
    x, weight, hidden, pairs, experts, num_pairs, num_tiles, top_k, F, D,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[pair] = swiglu(gate_up_e x[pair // k]); weight [E, 2F, D], hidden [num_pairs, F]."""
    tile, column = _tile_of(num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(experts + tile)
    if expert >= 0:
        pair = tl.load(pairs + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        here = pair < num_pairs
        outputs = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        # A row that is no pair reads token 0, and is not stored.
        token = tl.where(here, pair // top_k, 0).to(tl.int64)
        x_at = x + token[:, None] * D + inner[None, :]
        own = weight + expert.to(tl.int64) * 2 * F * D
        gate_at = own + (outputs % F)[None, :].to(tl.int64) * D + inner[:, None]
        up_at = gate_at + tl.cast(F, tl.int64) * D
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_K):
            if EVEN_K:
                xs = tl.load(x_at)
                gate = tl.dot(xs, tl.load(gate_at), gate)
                up = tl.dot(xs, tl.load(up_at), up)
            else:
                left = inner < D - start
                xs = tl.load(x_at, mask=left[None, :], other=0.0)
                gate = tl.dot(xs, tl.load(gate_at, mask=left[:, None], other=0.0), gate)
                up = tl.dot(xs, tl.load(up_at, mask=left[:, None], other=0.0), up)
            x_at += BLOCK_K
            gate_at += BLOCK_K
            up_at += BLOCK_K
        out = gate * tl.sigmoid(gate) * up
        at = hidden + pair[:, None].to(tl.int64) * F + outputs[None, :]
        tl.store(at, out.to(hidden.dtype.element_ty), mask=here[:, None] & (outputs < F)[None, :])


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _down_kernel(
    hidden, weight, routing, out, pairs, experts, num_pairs, num_tiles, D, F,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[pair] = routing[pair] down_e hidden[pair]; weight [E, D, F], out float32 [num_pairs, D]."""
    tile, column = _tile_of(num_tiles, tl.cdiv(D, BLOCK_N), GROUP)
    expert = tl.load(experts + tile)
    if expert >= 0:
        pair = tl.load(pairs + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        here = pair < num_pairs
        outputs = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        hidden_at = hidden + tl.where(here, pair, 0).to(tl.int64)[:, None] * F + inner[None, :]
        own = weight + expert.to(tl.int64) * D * F
        weight_at = own + (outputs % D)[None, :].to(tl.int64) * F + inner[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, F, BLOCK_K):
            if EVEN_K:
                total = tl.dot(tl.load(hidden_at), tl.load(weight_at), total)
            else:
                left = inner < F - start
                rows = tl.load(hidden_at, mask=left[None, :], other=0.0)
                total = tl.dot(rows, tl.load(weight_at, mask=left[:, None], other=0.0), total)
            hidden_at += BLOCK_K
            weight_at += BLOCK_K
        total *= tl.load(routing + pair, mask=here, other=0.0)[:, None]
        at = out + pair[:, None].to(tl.int64) * D + outputs[None, :]
        tl.store(at, total, mask=here[:, None] & (outputs < D)[None, :])


@triton.jit
def _sum_kernel(results, out, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = results[t, 0] + ... + results[t, k - 1], in this order; results float32 [T, k, D]."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(results + (token * TOP_K + j) * D + at, mask=at < D, other=0.0)
    tl.store(out + token * D + at, total.to(out.dtype.element_ty), mask=at < D)


def sort_into_tiles(experts: torch.Tensor, num_experts: int, rows: int) -> ExpertTiles:
    """As `kernels.moe.sort_into_tiles`, experts int64 [T, k], contiguous."""
    num_pairs = experts.numel()
    if num_pairs > _SORT_PAIRS:
        return moe.sort_into_tiles(experts, num_experts, rows)
    capacity = tile_capacity(num_pairs, num_experts, rows)
    pairs = torch.empty(capacity, dtype=torch.int32, device=experts.device)
    tile_experts = torch.empty(capacity // rows, dtype=torch.int32, device=experts.device)
    _sort_kernel[(1,)](
        experts, pairs, tile_experts, num_pairs, capacity,
        ROWS=rows, BLOCK_E=triton.next_power_of_2(num_experts), CHUNK=_SORT_CHUNK, num_warps=_SORT_WARPS,
    )  # fmt: skip
    return ExpertTiles(rows, pairs, tile_experts)


def expert_mlp(
    x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """x [T, d] bfloat16 or float16; routing float32 [T, k], experts [T, k] -> [T, d]."""
    _check(x, weights, routing, experts)
    tokens, top_k = experts.shape
    num_experts, hidden_size, width = weights.down.shape
    num_pairs = tokens * top_k
    out = torch.empty_like(x)
    if not num_pairs:
        return out
    size = next(i for i, one in enumerate(_GATE_UP) if num_pairs / num_experts <= one.rows_an_expert)
    tiles = sort_into_tiles(experts, num_experts, _GATE_UP[size].block_m)
    hidden = torch.empty(num_pairs, width, dtype=x.dtype, device=x.device)
    results = torch.empty(num_pairs, hidden_size, dtype=torch.float32, device=x.device)
    num_tiles = len(tiles.experts)
    gate_up, down = _GATE_UP[size], _DOWN[size]
    _gate_up_kernel[(num_tiles * triton.cdiv(width, gate_up.block_n),)](
        x, weights.gate_up, hidden, tiles.pairs, tiles.experts, num_pairs, num_tiles, top_k, width,
        hidden_size, **_constants(gate_up, hidden_size),
    )  # fmt: skip
    _down_kernel[(num_tiles * triton.cdiv(hidden_size, down.block_n),)](
        hidden, weights.down, routing, results, tiles.pairs, tiles.experts, num_pairs, num_tiles,
        hidden_size, width, **_constants(down, width),
    )  # fmt: skip
    _sum_kernel[(tokens, triton.cdiv(hidden_size, _SUM_WIDTH))](
        results, out, hidden_size, TOP_K=top_k, BLOCK=_SUM_WIDTH, num_warps=_SUM_WARPS
    )
    return out


def variants() -> Iterator[Variant]:
    """Every size of tile and dtype, with tails and without; the sum and the sort at the usual sizes."""
    for kind in _TYPES.values():
        for gate_up, down in zip(_GATE_UP, _DOWN, strict=True):
            for even in (True, False):
                yield _variant("gate_up", kind, gate_up, even)
                yield _variant("down", kind, down, even)
        for top_k in (2, 8):
            yield Variant(
                name=f"sum {kind} k{top_k}",
                kernel=_sum_kernel,
                signature={"results": "*fp32", "out": f"*{kind}", "D": "i32"},
                constexprs={"TOP_K": top_k, "BLOCK": _SUM_WIDTH},
                num_warps=_SUM_WARPS,
                num_stages=3,
                aligned=("results", "out", "D"),
            )
    for rows in sorted({one.block_m for one in _GATE_UP}):
        for num_experts in (8, 128):
            yield Variant(
                name=f"sort E{num_experts} M{rows}",
                kernel=_sort_kernel,
                signature={"chosen": "*i64", "pairs": "*i32", "tile_experts": "*i32"}
                | dict.fromkeys(("num_pairs", "capacity"), "i32"),
                constexprs={"ROWS": rows, "BLOCK_E": num_experts, "CHUNK": _SORT_CHUNK},
                num_warps=_SORT_WARPS,
                num_stages=3,
                aligned=("chosen", "pairs", "tile_experts", "capacity"),
            )


def _constants(config: Config, inputs: int) -> dict[str, int | bool]:
    return {
        "EVEN_K": inputs % config.block_k == 0,
        "GROUP": _GROUP_TILES,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _variant(name: str, kind: str, config: Config, even: bool) -> Variant:
    tensor, ints = f"*{kind}", dict.fromkeys(("num_pairs", "num_tiles", "D", "F"), "i32")
    sorts = {"pairs": "*i32", "experts": "*i32"}
    if name == "gate_up":
        kernel, pointers = _gate_up_kernel, {"x": tensor, "weight": tensor, "hidden": tensor, **sorts}
        ints["top_k"] = "i32"
    else:
        kernel = _down_kernel
        pointers = {"hidden": tensor, "weight": tensor, "routing": "*fp32", "out": "*fp32", **sorts}
    constants = _constants(config, 0 if even else 1)
    return Variant(
        name=f"{name} {kind} M{config.block_m}{'' if even else ' tail'}",
        kernel=kernel,
        signature={**pointers, **ints},
        constexprs={key: value for key, value in constants.items() if not key.startswith("num_")},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=("mma" if config.block_m >= 64 else "mma.sync", "cp.async"),
        aligned=(*pointers, "D", "F"),
    )


def _check(x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor) -> None:
    num_experts, hidden_size, width = weights.down.shape
    if weights.gate_up.shape != (num_experts, 2 * width, hidden_size) or x.shape[1:] != (hidden_size,):
        raise ValueError(
            f"gate_up {tuple(weights.gate_up.shape)}, down {tuple(weights.down.shape)} and activations "
            f"{tuple(x.shape)} do not belong together"
        )
    if x.dtype not in _TYPES or {weights.gate_up.dtype, weights.down.dtype} != {x.dtype}:
        raise ValueError(f"activations and weights must be bfloat16 or float16; these are {x.dtype}")
    if (
        routing.dtype != torch.float32
        or experts.dtype != torch.int64
        or routing.shape != experts.shape
        or len(experts) != len(x)
    ):
        raise ValueError("routing must be float32 and experts int64, both [T, k]")
    if not all(one.is_contiguous() for one in (x, weights.gate_up, weights.down, routing, experts)):
        raise ValueError("activations, weights and routing must be contiguous")
