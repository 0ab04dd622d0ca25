"""`--pressure F`: the scheduler in a pool of F times the blocks its load needs, beside an oracle in the same.

The same requests run four times: in a pool where they never lack a block, whose peak sets the small pool's
size; in the small pool by an oracle that knows every output's length; by the production scheduler behind
a Router's line, with reservations as Ingress asks them; and by it when nobody reserves anything, so that
its own foresight is all there is. The oracle is the best of several orders, by a simulation with the step
times of the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.load import StepCoefficients
from serving.bench.engine.offline import EngineSetup, EngineUnderTest
from serving.bench.engine.pressure_lines import ORACLE_ORDERS, OpenDoor, OracleLine, RouterLine
from serving.bench.engine.pressure_replay import (
    CostedSteps,
    KnownRequest,
    Line,
    LoadShape,
    RealSteps,
    Replayed,
    StepRunner,
    draw_load,
    replay,
)
from serving.engine.block_pool import BlockPool
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduler import Scheduler
from serving.engine.step_time import StepTimeModel

LEAST_OF_ORACLE = 0.85
MOST_RECOMPUTED = 0.05
CONTEXT_TOKENS = 4096  # more than any of the load's requests comes to


@dataclass(frozen=True)
class PressureRow:
    name: str
    pool_blocks: int
    run: Replayed


@dataclass(frozen=True)
class PressureResult:
    """`ours` reserves as Ingress does; `unreserved` is the same scheduler when nobody reserves."""

    fraction: float
    oracle_order: str
    unconstrained: PressureRow
    oracle: PressureRow
    ours: PressureRow
    unreserved: PressureRow
    of_oracle: float  # throughput of `ours` as a part of the oracle's
    unreserved_of_oracle: float
    passes: bool


class Pressure:
    """One load and one engine's sizes. `runner` makes what executes a run's steps."""

    def __init__(
        self,
        requests: Sequence[KnownRequest],
        limits: SchedulerLimits,
        block_tokens: int,
        runner: Callable[[], StepRunner],
    ) -> None:
        self._requests = requests
        self._limits = limits
        self._block_tokens = block_tokens
        self._runner = runner
        self._unreserved = [
            replace(known, submit=msgspec.structs.replace(known.submit, reserve_blocks=0))
            for known in requests
        ]

    def needed_blocks(self) -> int:
        """The most blocks the load holds at once where it never lacks any, however long steps take."""
        no_cost = CostedSteps(StepCoefficients(0.0, 1.0, 0.0), self._requests)
        whole = sum(-(-(known.needed_tokens + 1) // self._block_tokens) for known in self._requests)
        return self.row("", OpenDoor(self._unreserved), whole, no_cost).run.peak_blocks

    def measure(
        self, fraction: float, coefficients: Callable[[], StepCoefficients], tell: Callable[[str], object]
    ) -> PressureResult:
        """All four runs; `coefficients` are asked for after the first."""
        tell("all the blocks it needs")
        needed = self.needed_blocks()
        unconstrained = self.row("unconstrained", OpenDoor(self._unreserved), needed)
        num_blocks = int(fraction * needed)
        tell(f"simulating oracles on {num_blocks} blocks")
        order = self._best_order(num_blocks, coefficients())
        tell(f"the oracle, {order}")
        oracle = self.row(f"oracle, {order}", OracleLine(self._requests, order), num_blocks)
        tell("ours")
        ours = self.row("ours, reserving as Ingress does", RouterLine(self._requests), num_blocks)
        tell("ours, with nothing reserved")
        unreserved = self.row("ours, nothing reserved", RouterLine(self._unreserved), num_blocks)
        of_oracle = ours.run.tokens_per_s / oracle.run.tokens_per_s
        return PressureResult(
            fraction=fraction,
            oracle_order=order,
            unconstrained=unconstrained,
            oracle=oracle,
            ours=ours,
            unreserved=unreserved,
            of_oracle=of_oracle,
            unreserved_of_oracle=unreserved.run.tokens_per_s / oracle.run.tokens_per_s,
            passes=of_oracle >= LEAST_OF_ORACLE and ours.run.recomputed_share <= MOST_RECOMPUTED,
        )

    def row(self, name: str, line: Line, num_blocks: int, runner: StepRunner | None = None) -> PressureRow:
        pool = BlockPool(num_blocks, self._block_tokens)
        foresight = line.foresight(pool, self._limits.max_context_tokens)
        scheduler = Scheduler(pool, self._limits, foresight)
        run = replay(self._requests, line, scheduler, runner or self._runner())
        scheduler.check_integrity()
        return PressureRow(name, num_blocks, run)

    def _best_order(self, num_blocks: int, coefficients: StepCoefficients) -> str:
        """The order in which the oracle is fastest, by simulation."""

        def tokens_per_s(order: str) -> float:
            steps = CostedSteps(coefficients, self._requests)
            return self.row(order, OracleLine(self._requests, order), num_blocks, steps).run.tokens_per_s

        return max(ORACLE_ORDERS, key=tokens_per_s)


def run(
    setup: EngineSetup, fraction: float, console: Console, *, seed: int = 0, shape: LoadShape | None = None
) -> PressureResult:
    """Measure on the real model, and print the table."""
    requests = draw_load(shape or LoadShape(), setup.block_tokens, seed)
    limits = SchedulerLimits(setup.max_num_seqs, setup.max_step_tokens, CONTEXT_TOKENS)
    pressure = Pressure(
        requests, limits, setup.block_tokens, lambda: _real_steps(engine, step_time, requests)
    )
    with EngineUnderTest(replace(setup, kv_blocks=pressure.needed_blocks())) as engine:
        step_time = StepTimeModel(engine.spec, engine.worker.kv_dtype)
        with console.status("") as status:
            result = pressure.measure(
                fraction, lambda: step_time.coefficients, lambda what: status.update(f"pressure: {what}")
            )
    print_result(result, console)
    return result


def simulate(
    coefficients: StepCoefficients,
    fraction: float,
    *,
    seed: int = 0,
    shape: LoadShape | None = None,
    max_num_seqs: int = 64,
    max_step_tokens: int = 512,
    block_tokens: int = 16,
) -> PressureResult:
    """The same on a simulated clock, with steps that cost what `coefficients` say: seconds, not minutes."""
    requests = draw_load(shape or LoadShape(), block_tokens, seed)
    limits = SchedulerLimits(max_num_seqs, max_step_tokens, CONTEXT_TOKENS)
    pressure = Pressure(requests, limits, block_tokens, lambda: CostedSteps(coefficients, requests))
    return pressure.measure(fraction, lambda: coefficients, lambda what: None)


def _real_steps(
    engine: EngineUnderTest, step_time: StepTimeModel, requests: Sequence[KnownRequest]
) -> RealSteps:
    return RealSteps(engine.worker, step_time, engine.setup.block_tokens, requests)


def print_result(result: PressureResult, console: Console) -> None:
    table = Table(title=f"{result.fraction:g} of the KV blocks the load needs")
    table.add_column("scheduler")
    for column in ("blocks", "tokens/s", "of oracle", "outputs a step", "preemptions", "recomputed"):
        table.add_column(column, justify="right")
    for row in (result.unconstrained, result.oracle, result.ours, result.unreserved):
        table.add_row(
            row.name,
            str(row.pool_blocks),
            f"{row.run.tokens_per_s:.1f}",
            f"{row.run.tokens_per_s / result.oracle.run.tokens_per_s:.1%}",
            f"{row.run.mean_batch:.1f}",
            str(row.run.num_preemptions),
            f"{row.run.recomputed_share:.2%}",
        )
    console.print(table)
    console.print(
        f"{'PASS' if result.passes else 'FAIL'}: {result.of_oracle:.1%} of the oracle's throughput "
        f"(at least {LEAST_OF_ORACLE:.0%}), {result.ours.run.recomputed_share:.2%} of tokens computed again "
        f"(at most {MOST_RECOMPUTED:.0%})"
    )
