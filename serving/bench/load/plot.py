"""A load as a picture. It alone of this package needs matplotlib, the extra `searoom[bench]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from serving.bench.load.report import Report, RequestRow

_SIZE_INCHES = (15.0, 4.5)


def write_plot(report: Report, path: Path) -> None:
    """TTFT over the run with what failed, and how TTFT and TPOT are distributed, as a PNG."""
    figure = Figure(figsize=_SIZE_INCHES, layout="tight")
    over_time, ttft, tpot = figure.subplots(1, 3)
    for run in report.runs:
        _over_time(over_time, run.requests, run.label)
        _distribution(ttft, [row.ttft_ms for row in run.requests if row.state == "ok"], run.label)
        _distribution(tpot, [row.tpot_ms for row in run.requests if row.state == "ok"], run.label)
    over_time.set_xlabel("due, s since the start")
    over_time.set_ylabel("TTFT, ms; x: no answer")
    over_time.set_yscale("log")
    ttft.set_xlabel("TTFT, ms")
    ttft.set_xscale("log")
    tpot.set_xlabel("TPOT, ms")
    if report.slo is not None:
        for axes, limit in ((ttft, report.slo.ttft_ms), (tpot, report.slo.tpot_ms)):
            if limit is not None:
                axes.axvline(limit, color="black", linestyle=":", label="SLO")
    for axes in (ttft, tpot):
        axes.set_ylabel("share of answered requests")
        axes.set_ylim(0, 1)
    for axes in (over_time, ttft, tpot):
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(f"{report.model} at {report.endpoint}, {report.workload}")
    figure.savefig(path, dpi=150, format="png")


def _over_time(axes: Axes, rows: Sequence[RequestRow], label: str) -> None:
    answered = [(row.due_s, row.ttft_ms) for row in rows if row.state == "ok" and row.ttft_ms is not None]
    (line,) = axes.plot([due for due, _ in answered], [ttft for _, ttft in answered], ".", label=label)
    missed = [row.due_s for row in rows if row.state in ("refused", "failed")]
    at_the_bottom = axes.get_xaxis_transform()  # y in shares of the axis
    axes.plot(missed, [0.02] * len(missed), "x", color=line.get_color(), transform=at_the_bottom)


def _distribution(axes: Axes, values: Sequence[float | None], label: str) -> None:
    known = np.sort([value for value in values if value is not None])
    if known.size:
        axes.step(known, np.arange(1, known.size + 1) / known.size, where="post", label=label)
