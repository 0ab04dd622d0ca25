"""The comparison as a picture. It alone needs matplotlib, the extra `searoom[bench]`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from serving.bench.engine.report import Report

_SIZE_INCHES = (11.0, 4.5)


def write_plot(report: Report, path: Path) -> None:
    """Tokens/s over the batch size, and prefill rates beside it, as a PNG."""
    figure = Figure(figsize=_SIZE_INCHES, layout="tight")
    decode, prefill = figure.subplots(1, 2, width_ratios=(2, 1))
    for row in report.rows:
        points = [p for p in report.points if p.row == row.name and p.load.kind == "decode"]
        decode.plot(
            [p.load.batch for p in points],
            [p.tokens_per_s for p in points],
            marker="o",
            linestyle="-" if row.peer is None else "--",
            label=row.name,
        )
    decode.set_xscale("log", base=2)
    decode.set_yscale("log")
    decode.set_xlabel("batch size")
    decode.set_ylabel("output tokens/s, prefill included")
    decode.xaxis.set_major_formatter("{x:.0f}")
    decode.yaxis.set_major_formatter("{x:.0f}")
    decode.grid(visible=True, alpha=0.3)
    decode.legend()
    prefills = [p for p in report.points if p.load.kind == "prefill"]
    bars = prefill.barh([p.row for p in prefills], [p.tokens_per_s for p in prefills])
    prefill.bar_label(bars, fmt="%.0f", padding=3)
    prefill.invert_yaxis()
    prefill.set_xlabel("prefill tokens/s")
    figure.suptitle(f"{report.model}, {report.machine.threads} threads, {report.machine.cpu}")
    figure.savefig(path, dpi=150, format="png")
