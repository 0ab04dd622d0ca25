"""Do the baselines pick as the real gateways do? `python -m serving.bench.router.check_baselines --help`

One sequence of requests with shared prefixes goes through a gateway (`smg`, `vllm-router` or
`sglang-router`) as its project ships it, at default settings, in front of mock workers. Each rule is
then asked about the same requests, with the gateway's own picks so far as its past: so one different
pick is one difference, not the beginning of another history.

A pick is equal where the rule's best replicas have it among them. Where they are several the gateway
draws; *decided* are the picks of which the rule allows one only.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from serving.bench.router.baseline_affinity import SglangCacheAware, Smg, VllmRouter
from serving.bench.router.baseline_views import Asked, Candidate, Rule
from serving.bench.router.gateway_run import ARGUMENTS, End, GatewayFailed, Send, Step, picks_of
from serving.bench.router.gateway_workers import named

REQUIRED = 0.95
SHOWN_DIFFERENCES = 5
RULES: Mapping[str, Callable[[], Rule]] = {
    "smg": Smg,
    "vllm-router": VllmRouter,
    "sglang-router": SglangCacheAware,
}


@dataclass(frozen=True, slots=True)
class Difference:
    number: int
    gateway: str
    rule: tuple[str, ...]
    loads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    picks: int
    equal: int
    decided: int  # where the rule allows one replica only
    decided_equal: int
    differences: tuple[Difference, ...]

    @property
    def is_enough(self) -> bool:
        """Of all picks and of the decided ones, REQUIRED are equal."""
        return self.equal >= REQUIRED * self.picks and self.decided_equal >= REQUIRED * self.decided > 0


def sequence(seed: int, num_requests: int = 420) -> list[Step]:
    """Sessions that grow, shared system prompts and strangers, about a dozen in flight; in the middle a
    hundred requests of one prefix, of which none ends until all are there."""
    rng = random.Random(seed)
    systems = [_text(rng, rng.randint(100, 1_500)) for _ in range(8)]
    sessions = [rng.choice(systems) + _text(rng, 200) for _ in range(24)]
    hot = _text(rng, 1_200)
    steps: list[Step] = []
    in_flight: list[int] = []
    burst = range(num_requests // 2 - 50, num_requests // 2 + 50)
    for number in range(num_requests):
        if number in burst:
            text = hot + _text(rng, rng.randint(50, 400))
        else:
            text = _next_text(rng, systems, sessions)
            while len(in_flight) > rng.randint(6, 18):
                ended = in_flight.pop(rng.randrange(len(in_flight)))
                steps.append(End(ended))
        steps.append(Send(number, text))
        in_flight.append(number)
    return steps


def agreement(rule: Rule, steps: Sequence[Step], picks: Mapping[int, int], num_workers: int) -> Agreement:
    """How `rule` compares with the picks a gateway made of these steps: worker by request."""
    workers = [Candidate(f"worker {row}", "", row) for row in range(num_workers)]
    for worker in workers:
        rule.joined(worker.name)
    equal = decided = decided_equal = 0
    differences = []
    for moment, step in enumerate(steps):
        if isinstance(step, End):
            workers[picks[step.number]].in_flight -= 1
            continue
        text = named(step.text, step.number)
        asked = Asked(str(step.number), text, grain=1, size=len(text), prompt_tokens=len(text))
        now = moment / 1e3  # far from any interval
        best = rule.choose(asked, workers, now)
        picked = workers[picks[step.number]]
        equal += picked in best
        decided += len(best) == 1
        decided_equal += len(best) == 1 and picked in best
        if picked not in best:
            names = tuple(worker.name for worker in best)
            loads = tuple(worker.in_flight for worker in workers)
            differences.append(Difference(step.number, picked.name, names, loads))
        rule.routed(asked, picked, now)
        picked.in_flight += 1
    return Agreement(len(picks), equal, decided, decided_equal, tuple(differences))


def check(
    gateway: Annotated[str, typer.Option(help=" or ".join(ARGUMENTS))],
    python: Annotated[Path, typer.Option(help="interpreter of the environment the gateway is installed in")],
    workers: Annotated[int, typer.Option(min=2, max=32)] = 5,
    requests: Annotated[int, typer.Option(min=300)] = 420,
    seed: int = 0,
    record: Annotated[Path | None, typer.Option(help="write the gateway's picks here, as JSON")] = None,
) -> None:
    """Compare the baselines' picks with those of a real gateway; ends with 1 below 95 % equal ones."""
    if gateway not in ARGUMENTS:
        raise typer.BadParameter(f"no such gateway; choose from {', '.join(ARGUMENTS)}")
    steps = sequence(seed, requests)
    with typer.progressbar(length=len(steps), label=gateway) as bar:
        try:
            picks = asyncio.run(picks_of(gateway, python.absolute(), steps, workers, lambda: bar.update(1)))
        except GatewayFailed as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
    if record is not None:
        in_order = [picks[number] for number in range(requests)]
        record.write_text(
            json.dumps({"gateway": gateway, "workers": workers, "seed": seed, "picks": in_order})
        )
    shares = [sum(pick == worker for pick in picks.values()) for worker in range(workers)]
    typer.echo(f"\n{len(picks)} requests, a worker: {shares}\n")
    typer.echo(f"{'rule':<14} {'equal':>18} {'of the decided':>20}")
    for name, make_rule in RULES.items():
        found = agreement(make_rule(), steps, picks, workers)
        of_all, of_decided = _share(found.equal, found.picks), _share(found.decided_equal, found.decided)
        typer.echo(f"{name:<14} {of_all:>18} {of_decided:>20}")
    own = agreement(RULES[gateway](), steps, picks, workers)
    for difference in own.differences[:SHOWN_DIFFERENCES]:
        typer.echo(
            f"  request {difference.number}: {gateway} chose {difference.gateway}, the rule "
            f"{' or '.join(difference.rule)}; in flight {list(difference.loads)}"
        )
    raise typer.Exit(0 if own.is_enough else 1)


def _next_text(rng: random.Random, systems: Sequence[str], sessions: list[str]) -> str:
    kind = rng.random()
    if kind < 0.5:
        session = rng.randrange(len(sessions))
        sessions[session] += _text(rng, rng.randint(50, 400))
        return sessions[session]
    if kind < 0.8:
        return rng.choice(systems) + _text(rng, rng.randint(50, 3_000))
    return _text(rng, rng.randint(100, 2_000))


def _text(rng: random.Random, chars: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase + " ", k=chars))


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} = {part / whole:.1%}" if whole else "-"


if __name__ == "__main__":
    typer.run(check)
