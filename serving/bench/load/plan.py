"""What the flags ask for, checked: which sessions, when, and until when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from serving.bench.load import arrivals, sessions
from serving.bench.load.run import Limits
from serving.bench.load.sessions import Session
from serving.bench.router.traces import MOONCAKE_BLOCK_TOKENS, read_trace
from serving.bench.router.workload import Workload
from serving.errors import ConfigError

STORY_TOKENS = 64
THINK_S = 5.0
_RUNS_A_SEED = 1000

Kind = Literal["stories", "generated"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A closed loop where `streams` are given, one run each; else one open loop."""

    workload: Kind = "stories"
    trace: Path | None = None
    streams: tuple[int, ...] = ()
    rate: float | None = None  # requests/s; None in an open loop: the trace's own times
    speed: float | None = None  # of the trace's times
    raw_times: bool = False
    requests: int | None = None
    duration_s: float | None = None
    think_s: float | None = None
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for flags that contradict each other, or a load without an end."""
        if self.streams and (self.rate is not None or self.speed is not None):
            flag = "--speed" if self.rate is None else "--rate"
            raise ConfigError(f"{flag} is of an open loop, --streams makes a closed one: give one of them")
        if self.trace is not None and self.workload != "stories":
            raise ConfigError("--trace and --workload: give one of them")
        if self.trace is None and (self.speed is not None or self.raw_times or self.max_prompt_tokens):
            raise ConfigError("--speed, --raw-times and --max-prompt-tokens are of a --trace; name its file")
        if self.speed is not None and self.rate is not None:
            raise ConfigError("--speed scales the trace's times, --rate replaces them: give one of them")
        if self.think_s is not None and self.workload != "generated":
            raise ConfigError("--think-s is of sessions with several turns: --workload generated")
        if not self.streams and self.rate is None and self.trace is None:
            raise ConfigError("an open loop needs --rate R or --trace FILE")
        has_end = self.streams or self.trace is not None or self.requests or self.duration_s
        if not has_end:
            raise ConfigError("--rate: say when to stop, with --requests N or --duration SECONDS")

    @property
    def name(self) -> str:
        return self.workload if self.trace is None else self.trace.name

    def limits(self, num_streams: int | None) -> Limits:
        """A closed loop without any sends one request a stream."""
        requests = self.requests
        if num_streams is not None and self.trace is None and requests is None and self.duration_s is None:
            requests = num_streams
        return Limits(requests, self.duration_s)

    def read(self) -> Workload | None:
        """The trace, where there is one. Raises ConfigError."""
        if self.trace is None:
            return None
        return read_trace(self.trace, MOONCAKE_BLOCK_TOKENS, self.seed, self.raw_times)

    def sessions(self, trace: Workload | None, run: int) -> Iterator[Session]:
        """What the plan's run of this number sends. No run's generated texts are in another's cache."""
        seed = self.seed * _RUNS_A_SEED + run
        mean_turns = 1.0
        if trace is not None:
            found = sessions.replayed(
                trace.requests, seed, max_tokens=self.max_tokens, max_prompt_tokens=self.max_prompt_tokens
            )
        elif self.workload == "generated":
            think_s = (0.0 if self.streams else THINK_S) if self.think_s is None else self.think_s
            found = sessions.generated(seed, think_s, self.max_tokens)
            mean_turns = sessions.MEAN_TURNS
        else:
            found = sessions.stories(self.max_tokens or STORY_TOKENS)
        if self.rate is not None:
            return arrivals.poisson(found, self.rate / mean_turns, seed)
        return found if self.speed is None else arrivals.sped_up(found, self.speed)

    def notes(self, trace: Workload | None) -> tuple[str, ...]:
        """What is not as the trace has it."""
        if trace is None:
            return ()
        notes = list(trace.notes) if self.rate is None else [f"its lengths, at {self.rate:g} requests/s"]
        for what, cap, lengths in (
            ("prompts", self.max_prompt_tokens, [r.prompt_tokens for r in trace.requests]),
            ("answers", self.max_tokens, [r.output_tokens for r in trace.requests]),
        ):
            num_cut = sum(length > (cap or math.inf) for length in lengths)
            if num_cut:
                notes.append(f"{num_cut} of {len(lengths)} {what} cut to {cap} tokens")
        return tuple(notes)


def parse_streams(text: str) -> tuple[int, ...]:
    """Raises ConfigError for anything but numbers above 0 with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--streams {text}: give numbers above 0 with commas between, like 1,8,64")
    return tuple(int(part) for part in parts)


def parse_endpoint(text: str) -> str:
    """The endpoint without a slash or /v1 at its end. Raises ConfigError where it is no URL."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is none, or a broken IPv6 address
        known = False
    if not known:
        raise ConfigError(f"--endpoint {text}: give a URL like http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")
