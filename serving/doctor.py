"""`searoom doctor --engine`: what this machine gives, what the engine makes of it, and what would help.

It brings torch, so the command imports it only when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from kernels import machine as machine_measure
from kernels.cpu import library
from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest
from serving.config import parse_config
from serving.engine.limits import SchedulerLimits
from serving.engine.machine import Machine
from serving.host import Finding, findings, read_host
from serving.messages import StepStats

_BATCHES = (1, 16)
_PROMPT_TOKENS, _NEW_TOKENS = 40, 32
_GOOD_SHARE = 0.5  # of the floor's speed


@dataclass(frozen=True)
class Decode:
    """A few decode steps of one batch: medians."""

    batch_size: int
    step_ms: float
    floor_ms: float
    intensity: float
    bound: str

    @classmethod
    def of(cls, batch_size: int, steps: tuple[StepStats, ...]) -> Decode:
        """Of the steps in which nothing but this batch's decodes ran."""
        own = [s for s in steps if s.decode_tokens == batch_size and s.prefill_tokens == 0]
        return cls(
            batch_size=batch_size,
            step_ms=float(np.median([s.step_ms for s in own])),
            floor_ms=float(np.median([s.floor_ms for s in own])),
            intensity=float(np.median([s.flops / s.bytes_moved for s in own])),
            bound=own[-1].bound,
        )


def run(setup: EngineSetup, console: Console) -> None:
    """Print facts, each with what to do about it where something is to be done."""
    host = read_host()
    _section(console, "machine", findings(host, setup.threads or host.usable_cores))
    _section(console, "native path", [native(library.unsupported())])
    with console.status("loading the model"):
        under_test = EngineUnderTest(setup)
    with under_test:
        sizing = under_test.worker.kv_sizing
        _section(console, "KV pool", [Finding(line) for line in sizing.lines(setup.block_tokens)])
        with console.status("measuring memory and cores"):
            dtype = parse_config({"model": {"dtype": setup.dtype}}, "--dtype").dtype
            machine = Machine(*machine_measure.measure(dtype))
        _section(console, "measured", rates(machine, dtype))
        with console.status("decoding"):
            blocks = -(-(_PROMPT_TOKENS + _NEW_TOKENS) // setup.block_tokens)
            most = min(setup.max_num_seqs, under_test.num_blocks // blocks)
            decodes = [_decode(under_test, machine, size) for size in _BATCHES if size <= most]
        _section(console, "decode", [speed(decode, machine) for decode in decodes])


def native(why_not: str | None) -> Finding:
    """Whether the compiled forward pass can serve here."""
    if why_not is None:
        return Finding("the compiled forward pass runs here")
    return Finding(
        f"the compiled forward pass does not run here: {why_not}",
        "install g++" if "compiler" in why_not else "PyTorch's kernels serve instead; a newer CPU would help",
    )


def rates(machine: Machine, dtype: str) -> list[Finding]:
    return [
        Finding(f"memory gives {machine.bytes_per_s / 1e9:.1f} GB/s"),
        Finding(f"{dtype} products reach {machine.flops_per_s / 1e9:.0f} GFLOP/s"),
        Finding(
            f"ridge point {machine.ridge_flop_per_byte:.1f} FLOP/byte: below it a step waits for memory, "
            "above it for compute"
        ),
    ]


def speed(decode: Decode, machine: Machine) -> Finding:
    """One batch's step beside its floor, and what the resource that binds suggests."""
    share = decode.floor_ms / decode.step_ms
    fact = (
        f"batch {decode.batch_size}: {decode.step_ms:.1f} ms a step, {decode.floor_ms:.1f} at least "
        f"({share:.0%} of the roofline); {decode.intensity:.1f} FLOP/byte, bound by {decode.bound}"
    )
    if share < _GOOD_SHARE:
        return Finding(
            fact, "much is lost above the hardware: see the machine's and the native path's advice"
        )
    if decode.bound == "memory":
        return Finding(
            fact,
            f"smaller weights (a quantised dtype), or batches up to {machine.ridge_flop_per_byte:.0f} "
            "FLOP/byte cost little more",
        )
    return Finding(fact, "more or wider cores; a dtype with faster products")


def _decode(under_test: EngineUnderTest, machine: Machine, batch_size: int) -> Decode:
    rng = np.random.default_rng(batch_size)
    limits = SchedulerLimits(
        max_num_seqs=batch_size,
        max_step_tokens=max(under_test.setup.max_step_tokens, batch_size * _PROMPT_TOKENS),
        max_context_tokens=under_test.spec.context_tokens,
    )
    under_test.rebuild(scheduler_limits=limits, machine=machine)
    requests = [
        BenchRequest(tuple(rng.integers(0, under_test.spec.vocab_size, _PROMPT_TOKENS).tolist()), _NEW_TOKENS)
        for _ in range(batch_size)
    ]
    return Decode.of(batch_size, under_test.run(requests).steps)


def _section(console: Console, title: str, lines: list[Finding]) -> None:
    console.print(f"\n[bold]{title}[/]")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
