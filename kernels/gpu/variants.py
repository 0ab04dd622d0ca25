"""What a family ships, as data: enough to compile it ahead of time, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One shipped (kernel, argument types, constants, options).

    `signature` maps the kernel's run-time arguments to types: "*bf16", "*fp16", "*fp32", "*fp8e4nv",
    "*i32", "*i8", "*i64", "*u8" for pointers, "i32", "i64", "fp32" for numbers; `constexprs` holds the
    rest. `aligned` names the arguments (pointers and numbers) that every launch has divisible by 16, as
    the run-time compiler would find for itself. `expects` names what must be in the assembly:
        "mma"       tensor cores, by the instructions of the architecture (wgmma on sm_90)
        "mma.sync"  tensor cores by any instruction: for tiles too small for wgmma
        "cp.async"  loads pipelined through shared memory
    `min_capability` is 90 where sm_80 has not the instructions (e4m3, say), and `max_capability` 80 where
    later ones have a configuration of their own. `fp_fusion`: as the launch has `enable_fp_fusion`, whether
    a product and a sum may be rounded once. `max_registers` of a thread: as the launch has `maxnreg`. Without
    it ptxas spills a register or two where that lets one more block onto a multiprocessor, which is of no
    use to a kernel whose launches do not have so many. `programs` must be resident on a multiprocessor at
    once, on the architecture of `min_capability`: what a launch or the hiding of latency counts on.
    """

    name: str
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    expects: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    min_capability: int = 80
    max_capability: int = 100
    fp_fusion: bool = True
    max_registers: int | None = None
    programs: int = 1
