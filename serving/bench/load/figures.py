"""What a run's records add up to. Latencies are of requests that were answered in full."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import msgspec
import numpy as np

from serving.bench.load.record import Record


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to count as good; None asks nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, record: Record) -> bool:
        """An answer of one token has no time a token, and keeps any."""
        if record.state != "ok" or (self.ttft_ms is not None and record.ttft_ms > self.ttft_ms):
            return False
        return self.tpot_ms is None or not record.tpot_ms > self.tpot_ms


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float
    max: float


class Goodput(msgspec.Struct, frozen=True):
    """Requests that kept the SLO. All others that ended, refused and failed ones too, are misses."""

    num_met: int
    share: float
    per_s: float


class Failures(msgspec.Struct, frozen=True):
    """Requests that failed alike, with the first one's words."""

    kind: str
    is_refusal: bool
    num_requests: int
    example: str


class Served(msgspec.Struct, frozen=True):
    """Where answers came from, as their headers said."""

    region: str
    replica: str
    num_requests: int


class Figures(msgspec.Struct, frozen=True):
    """Rates are over `elapsed_s`, from the start to the last answer. None: nothing to measure it by."""

    elapsed_s: float
    num_sent: int
    num_ok: int
    num_refused: int  # for good; `num_refusals` counts those too that a retry made good
    num_failed: int
    num_unfinished: int  # cut off by an interruption; they count nowhere else
    num_refusals: int
    requests_per_s: float  # answered
    tokens_per_s: float  # of those
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    inter_token_ms: Percentiles | None  # between two pieces of text of one answer
    e2e_ms: Percentiles | None
    lateness_ms: Percentiles | None  # of all that was sent: the generator's own
    goodput: Goodput | None  # None without an SLO
    failures: tuple[Failures, ...]
    served: tuple[Served, ...]


def figures(records: Sequence[Record], elapsed_s: float, slo: Slo | None) -> Figures:
    """The figures of a run that took so long."""
    ok = [record for record in records if record.state == "ok"]
    states = Counter(record.state for record in records)
    output_tokens = sum(record.output_tokens for record in ok)
    return Figures(
        elapsed_s=elapsed_s,
        num_sent=len(records),
        num_ok=len(ok),
        num_refused=states["refused"],
        num_failed=states["failed"],
        num_unfinished=states["open"],
        num_refusals=sum(record.refusals for record in records),
        requests_per_s=len(ok) / elapsed_s,
        tokens_per_s=output_tokens / elapsed_s,
        prompt_tokens=sum(record.prompt_tokens for record in ok),
        cached_tokens=sum(record.cached_tokens for record in ok),
        output_tokens=output_tokens,
        ttft_ms=percentiles(record.ttft_ms for record in ok),
        tpot_ms=percentiles(record.tpot_ms for record in ok),
        inter_token_ms=percentiles(chain.from_iterable(record.gaps_ms for record in ok)),
        e2e_ms=percentiles(record.e2e_ms for record in ok),
        lateness_ms=percentiles(record.lateness_ms for record in records),
        goodput=None if slo is None else _goodput(records, elapsed_s, slo),
        failures=_failures(records),
        served=_served(ok),
    )


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Linear between the two nearest ranks; nan values are left out. None when nothing is left."""
    known = np.fromiter((value for value in values if not math.isnan(value)), dtype=np.float64)
    if not known.size:
        return None
    p50, p90, p99 = np.percentile(known, (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99), float(known.max()))


def _goodput(records: Sequence[Record], elapsed_s: float, slo: Slo) -> Goodput | None:
    num_ended = sum(record.state != "open" for record in records)
    if not num_ended:
        return None
    num_met = sum(slo.met(record) for record in records)
    return Goodput(num_met, num_met / num_ended, num_met / elapsed_s)


def _failures(records: Sequence[Record]) -> tuple[Failures, ...]:
    """The most frequent first."""
    by_kind: dict[tuple[str, bool], list[Record]] = {}
    for record in records:
        if record.state in ("refused", "failed"):
            by_kind.setdefault((record.kind, record.state == "refused"), []).append(record)
    return tuple(
        Failures(kind, is_refusal, len(alike), alike[0].message)
        for (kind, is_refusal), alike in sorted(by_kind.items(), key=lambda item: -len(item[1]))
    )


def _served(ok: Sequence[Record]) -> tuple[Served, ...]:
    places = Counter((record.region, record.replica) for record in ok if record.region or record.replica)
    return tuple(Served(region, replica, number) for (region, replica), number in sorted(places.items()))
