"""Every shipped kernel compiled ahead of time for every architecture: no GPU, no driver.

What ptxas reports is checked against what a fast kernel must have: nothing in local memory (no spills, no
stack), shared memory within the architecture's limit, tensor cores where they are meant.

    occupancy = warps resident on an SM / warps it can hold

by registers, shared memory, warps and blocks (CUDA C++ Programming Guide, "Compute Capabilities").
"""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from kernels import gpu
from kernels.gpu.variants import Variant

_WARP = 32
_REGISTERS = 65536  # of an SM; a warp is given them 256 at a time
_REGISTER_UNIT = 256
_BLOCKS = 32
_WARPS = 64
_RESERVED_SHARED = 1024  # bytes that the system takes of each block's
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Architecture:
    """One SM's shared memory, in bytes, and the instructions of its tensor cores."""

    capability: int
    shared_per_block: int
    shared_per_sm: int
    mma: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


ARCHITECTURES = (
    Architecture(80, 163 << 10, 164 << 10, ("mma.sync",)),
    Architecture(90, 227 << 10, 228 << 10, ("wgmma",)),
    # ptxas takes mma.sync for small tiles there too.
    Architecture(100, 227 << 10, 228 << 10, ("tcgen05.mma", "mma.sync")),
)

# name → how its instructions are spelt in PTX
_INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05.mma": r"\btcgen05\.mma\.",
    "cp.async": r"\bcp\.async\.(?:ca|cg|bulk)\.",
}


@dataclass(frozen=True)
class Task:
    """The `index`th variant of `module`, for the architecture of this capability."""

    module: str
    index: int
    capability: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one variant; `failures` is empty where it is what it should be."""

    family: str
    variant: str
    architecture: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread; spilled registers are here
    local_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    instructions: dict[str, int]
    failures: tuple[str, ...]


def families() -> list[str]:
    """Modules of kernels.gpu that ship kernels: those with a `variants`."""
    names = (f"{gpu.__name__}.{module.name}" for module in pkgutil.iter_modules(gpu.__path__))
    return [name for name in names if hasattr(importlib.import_module(name), "variants")]


def tasks(
    only: Iterable[str] = (), capabilities: Iterable[int] = (), *, one_each: bool = False
) -> list[Task]:
    """All there is to compile, or of the families and capabilities named; `one_each`: only one variant of
    each kernel, the first of those made for the architecture.

    Raises ValueError where there is no such family.
    """
    chosen = list(only)
    known = {name.rpartition(".")[2]: name for name in families()}
    if unknown := set(chosen) - known.keys():
        raise ValueError(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    targets = set(capabilities) or {architecture.capability for architecture in ARCHITECTURES}
    return [
        Task(module, index, architecture.capability)
        for family, module in known.items()
        if not chosen or family in chosen
        for architecture in ARCHITECTURES
        if architecture.capability in targets
        for index in _shipped(_variants(module), architecture, one_each)
    ]


def compile_all(wanted: list[Task], processes: int = 2) -> Iterator[Compiled]:
    """Results in the order of `wanted`, as they are ready. ptxas is slow, hence the processes.

    Raises RuntimeError where Triton's interpreter is on: it leaves nothing to compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so there is nothing to compile")
    context = multiprocessing.get_context("spawn")  # LLVM's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_task, wanted)


def compile_task(task: Task) -> Compiled:
    """One variant for one architecture."""
    variant = _variants(task.module)[task.index]
    architecture = next(one for one in ARCHITECTURES if one.capability == task.capability)
    return compile_variant(task.module.rpartition(".")[2], variant, architecture)


def compile_variant(family: str, variant: Variant, architecture: Architecture) -> Compiled:
    """`variant` for `architecture`, checked; that it does not compile is a failure too."""
    try:
        kernel = _compile(variant, architecture.capability)
    except (TritonError, RuntimeError, ValueError) as error:
        why = f"does not compile: {type(error).__name__}: {error}"
        return Compiled(family, variant.name, architecture.name, 0, 0, 0, 0, variant.num_warps, 0, {}, (why,))
    usage = _resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    instructions = {name: len(re.findall(spelt, ptx)) for name, spelt in _INSTRUCTIONS.items()}
    shared = kernel.metadata.shared
    # A kernel whose warps are specialised has more of them than were asked for.
    warps = getattr(kernel.metadata, "num_warps", variant.num_warps)
    return Compiled(
        family=family,
        variant=variant.name,
        architecture=architecture.name,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=shared,
        warps=warps,
        occupancy=occupancy(architecture, usage["REG"], shared, warps),
        instructions={name: count for name, count in instructions.items() if count},
        failures=tuple(_failures(variant, architecture, usage, kernel.metadata, instructions)),
    )


def occupancy(architecture: Architecture, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of an SM's warps that can be resident, 0 where not one block fits."""
    return resident(architecture, registers, shared_bytes, warps) * warps / _WARPS


def resident(architecture: Architecture, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that fit an SM at once."""
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _BLOCKS,
        _WARPS // warps,
        _REGISTERS // (per_warp * warps),
        architecture.shared_per_sm // (shared_bytes + _RESERVED_SHARED),
    )


def _shipped(variants: list[Variant], architecture: Architecture, one_each: bool) -> list[int]:
    """Indices of the variants for `architecture`."""
    indices = [
        index
        for index, variant in enumerate(variants)
        if variant.min_capability <= architecture.capability <= variant.max_capability
    ]
    if not one_each:
        return indices
    first: dict[int, int] = {}
    for index in sorted(indices, key=lambda index: -variants[index].min_capability):  # stable
        first.setdefault(id(variants[index].kernel), index)
    return list(first.values())


def _variants(module: str) -> list[Variant]:
    return list(importlib.import_module(module).variants())


def _compile(variant: Variant, capability: int) -> triton.compiler.CompiledKernel:
    names = variant.kernel.arg_names
    missing = set(names) ^ (variant.signature.keys() | variant.constexprs.keys())
    if missing:
        raise ValueError(f"{variant.name}: arguments not in both variant and kernel: {sorted(missing)}")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
        "maxnreg": variant.max_registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, _WARP), options=options)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _failures(
    variant: Variant,
    architecture: Architecture,
    usage: dict[str, int],
    metadata: triton.compiler.CompiledKernel,
    instructions: dict[str, int],
) -> Iterator[str]:
    if usage["STACK"] or usage["LOCAL"]:
        yield f"spills: {usage['STACK']} B of stack, {usage['LOCAL']} B of local memory"
    if metadata.shared > architecture.shared_per_block:
        yield f"{metadata.shared} B of shared memory, above {architecture.shared_per_block}"
    if getattr(metadata, "tmem_size", None) and metadata.tmem_size > _TENSOR_MEMORY_COLUMNS:
        yield f"{metadata.tmem_size} columns of tensor memory, above {_TENSOR_MEMORY_COLUMNS}"
    if variant.min_capability == architecture.capability:
        warps = getattr(metadata, "num_warps", variant.num_warps)
        fitting = resident(architecture, usage["REG"], metadata.shared, warps)
        if fitting < variant.programs:
            yield f"{fitting} programs fit a multiprocessor, not {variant.programs}"
    tensor_cores = {"mma": architecture.mma, "mma.sync": ("mma.sync", "wgmma", "tcgen05.mma")}
    for expected in variant.expects:
        if not any(instructions[name] for name in tensor_cores.get(expected, (expected,))):
            yield f"no {expected}"
