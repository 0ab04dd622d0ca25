"""The page that `gpu.py` makes of its folder: targets, tables and failures, ready to become a dated note."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

BIG_KV_TOKENS = 256 * 1024
IDLE_BATCH = 32
NONE = "–"
ORDER = (
    "kernels", "engine-0.6b", "engine-8b", "peer-0.6b-64", "peer-0.6b-256", "peer-8b-64", "peer-8b-256",
    "startup", "collectives",
)  # fmt: skip


def summary(out: Path) -> str:
    """Markdown of all that lies in `out` and below; where a job ran twice, its later figures."""
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(out.rglob("*.json"))]
    runs = [run for name, entries in found if name == "runs" for run in entries]
    files = {name: report for name, report in found if name != "runs"}
    machine = files.get("machine", {})
    judged = list(targets(files))
    if machine.get("rehearsal"):
        judged = [(*row[:-1], "rehearsed") for row in judged]
    lines = [f"# The GPU path, {machine.get('date', '')[:10]}", ""]
    if machine.get("rehearsal"):
        lines += [
            "**A rehearsal on a CPU, in tiny: that everything runs. No figure here means anything.**",
            "",
        ]
    lines += [
        _machine(machine),
        "",
        "## Targets",
        "",
        *table(("target", "needed", "measured", ""), judged),
    ]
    for name in ORDER:
        if name in files:
            lines += _section(name, files[name])
    lines += ["", "## Runs", ""]
    ordered = sorted(runs, key=lambda run: run["started"])
    cells = (
        (run["job"], f"`{run['command']}`", _status(run), _number(run["seconds"], ".0f")) for run in ordered
    )
    lines += table(("job", "command", "status", "s"), cells)
    for run in (run for run in ordered if run["status"] != 0 and run.get("last")):
        lines += ["", f"{run['job']} ended with", "", "```", *run["last"], "```"]
    return "\n".join(lines)


def targets(files: dict[str, Figures]) -> Iterator[tuple[str, ...]]:
    """What was aimed at on an H100, of measured ceilings; not measured is neither pass nor miss."""
    cases = [case for case in files.get("kernels", {}).get("cases", []) if case.get("us")]
    decodes = [case["share"] for case in cases if case["family"] == "paged_decode" and case["share"]]
    yield _target(f"decode attention at {BIG_KV_TOKENS // 1024}k tokens of KV, worst shape, of bandwidth",
                  0.85, min(decodes, default=None))  # fmt: skip
    prefills = [
        case["flops"] / case["us"] / 1e6 for case in cases if case["shape"].startswith("prefill 8192@0 ")
    ]
    tflops = max(prefills, default=None)
    yield (
        "prefill attention, 8k, head dim 128, TFLOP/s",
        "≥ 450",
        _number(tflops, ".0f"),
        _verdict(tflops, 450),
    )
    for size, needed in (("0.6b", 0.70), ("8b", 0.80)):
        workloads = files.get(f"engine-{size}", {}).get("workloads", [])
        for one in workloads:
            if one["kind"] == "batch":
                yield _target(
                    f"{size}, {one['name']}: of the phases' floor", needed, one["phase_floor_share"]
                )
    large = files.get("engine-8b", {}).get("workloads", [])
    single = [one["bandwidth_share"] for one in large if one["kind"] == "decode" and one["requests"] == 1]
    yield _target("8b, batch-1 decode, of bandwidth", 0.80, max(single, default=None))
    for size in ("0.6b", "8b"):
        for one in files.get(f"engine-{size}", {}).get("workloads", []):
            if one["kind"] in ("decode", "context") and one["requests"] >= IDLE_BATCH:
                for way in ("traced", "untraced"):
                    name = f"{size}, {one['name']}: GPU idle, {way}"
                    yield _target(name, 0.02, one[f"{way}_idle_share"], at_most=True)
    for start in files.get("startup", {}).get("starts", []):
        took_s = start["first_token_s"]
        name = f"first token after a process's start, kernels {start['kernels']}, s"
        yield (name, "≤ 10", f"{took_s:.2f}", _verdict(took_s, 10, at_most=True))


def table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Markdown; a column each."""
    names = list(columns)
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *body]


def _section(name: str, report: Any) -> list[str]:
    if name == "kernels":
        return _kernels(report)
    if name.startswith("peer-"):
        return _peers(name, report)
    if "workloads" in report:
        return _engine(name, report)
    if "starts" in report:
        return _startup(report)
    return _collectives(report) if name == "collectives" else []


def _kernels(report: Figures) -> list[str]:
    rows = []
    for case in report["cases"]:
        if "why" in case:
            rows.append((case["family"], f"case {case['index']}", "broke", NONE, NONE, case["why"]))
            continue
        peers = "; ".join(f"{name} {_peer(time, case['us'])}" for name, time in case["peers"].items())
        right = "" if case["error"] <= case["tolerance"] else " **wrong**"
        error = f"{case['error']:.1e}{right}"
        rows.append(
            (case["family"], case["shape"], error, _number(case["us"], ".1f"), _share(case["share"]), peers)
        )
    ceilings = report.get("ceilings")
    told = []
    if ceilings:
        rates = ", ".join(
            f"{rate / 1e12:.0f} TFLOP/s {kind}" for kind, rate in ceilings["flops_per_s"].items()
        )
        told = [f"Ceilings measured in that run: {ceilings['bytes_per_s'] / 1e9:.0f} GB/s, {rates}.", ""]
    columns = ("family", "shape", "error", "µs", "of ceiling", "peers, × our time")
    return ["", "## Kernels", "", *told, *table(columns, rows)]


def _engine(name: str, report: Figures) -> list[str]:
    device, memory = report["device"], report["memory"]
    rows = [
        (
            one["name"],
            f"{one['tokens_per_s']:.1f}",
            _share(one["phase_floor_share"]),
            f"{one['step_ms']:.3f}",
            _share(one["step_floor_share"]),
            _share(one["bandwidth_share"]),
            f"{one['tflops']:.1f}",
            f"{one['ttft_p50_ms']:.0f}",
            f"{one['schedule_p50_ms']:.3f} / {one['schedule_p99_ms']:.3f}",
            f"{_share(one['traced_idle_share'])} / {_share(one['untraced_idle_share'])}",
            f"{one['first_run_s']:.1f}",
        )
        for one in report["workloads"]
    ]
    columns = (
        "workload", "tokens/s", "of phases' floor", "step ms", "of steps' floor", "of bandwidth", "TFLOP/s",
        "TTFT p50 ms", "scheduling p50 / p99 ms", "GPU idle traced / untraced", "first run s",
    )  # fmt: skip
    lines = [
        "", f"## {name}: {report['model']}, {report['dtype']}, random weights", "",
        f"Measured in that run: {device['bytes_per_s'] / 1e9:.0f} GB/s, {device['flops_per_s'] / 1e12:.1f} "
        f"TFLOP/s. Loaded in {report['load_s']:.1f} s; {memory['kv_blocks']} KV blocks of "
        f"{memory['block_tokens']} tokens, {_gib(memory['kv_bytes'])}; peak "
        f"{_gib(memory['peak_allocated_bytes'])} allocated, {_gib(memory['used_bytes'])} used; "
        f"{len(report['captures_s'])} graphs captured in {sum(report['captures_s']):.2f} s. At most "
        f"{report['max_num_seqs']} sequences and {report['max_step_tokens']} tokens a step.", "",
        *table(columns, rows),
    ]  # fmt: skip
    for one in report["workloads"]:
        if one["timeline"] and one["kind"] == "decode":
            shares = ", ".join(f"{kernel} {share:.0%}" for kernel, share in one["timeline"]["kernels"][:6])
            lines += ["", f"{one['name']}, where the GPU's time goes: {shares}."]
    return [*lines, *(f"\nFailed: {failure}" for failure in report["failures"])]


def _peers(name: str, report: Figures) -> list[str]:
    ours = {one["name"]: one for one in report["workloads"]}
    rows = [
        (
            peer["workload"],
            f"{ours[peer['workload']]['tokens_per_s']:.1f}",
            f"{peer['tokens_per_s']:.1f}",
            _share(peer["phase_floor_share"]),
            f"{peer['ours']:.2f}",
        )
        for peer in report["peers"]
    ]
    told = dict.fromkeys(peer["description"] for peer in report["peers"])
    columns = ("workload", "our tokens/s", "its tokens/s", "of phases' floor", "ours over its")
    lines = ["", f"## {name}: {report['model']} beside {', '.join(told) or 'a peer that gave nothing'}", ""]
    lines += table(columns, rows)
    return [*lines, *(f"\nFailed: {failure}" for failure in report["failures"])]


def _startup(report: Figures) -> list[str]:
    stages = list(report["starts"][0]["stages_s"]) if report["starts"] else []
    rows = [
        (
            start["kernels"],
            f"{start['first_token_s']:.2f}",
            *(f"{start['stages_s'][stage]:.2f}" for stage in stages),
        )
        for start in report["starts"]
    ]
    title = f"## Start to first token: {_gib(report['weights_bytes'])} of safetensors in the page cache"
    return ["", title, "", *table(("kernels", "first token s", *stages), rows)]


def _collectives(report: Figures) -> list[str]:
    rows = [
        (
            str(one["ranks"]),
            one["way"],
            str(one["bytes"] // 1024),
            f"{one['us']:.1f}",
            f"{one['bus_bytes_per_s'] / 1e9:.2f}" if one["ranks"] > 1 else "no link is crossed",
            _share(one["nominal_share"]),
        )
        for one in report["results"]
    ]
    columns = ("ranks", "way", "KiB", "µs", "GB/s of bus", "of nominal")
    return ["", f"## All-reduce: {report['backend']} {report['version']}", "", *table(columns, rows)]


def _machine(machine: Figures) -> str:
    gpus = "; ".join(
        f"{gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}, {gpu['power.limit']}, "
        f"{gpu['clocks.max.sm']} SM" for gpu in machine.get("gpus", [])
    )  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    libraries = machine.get("libraries") or {}
    return (
        f"{gpus or 'no GPU'}; {machine.get('cpu')}, {machine.get('cores')} cores, Linux "
        f"{machine.get('kernel')}; "
        f"Python {machine.get('python')}, {versions}, CUDA {libraries.get('cuda')}, NCCL "
        f"{libraries.get('nccl')}; "
        f"revision {machine.get('revision')}."
    )


def _target(name: str, needed: float, measured: float | None, at_most: bool = False) -> tuple[str, ...]:
    sign = "≤" if at_most else "≥"
    return (name, f"{sign} {needed:.0%}", _share(measured), _verdict(measured, needed, at_most))


def _verdict(measured: float | None, needed: float, at_most: bool = False) -> str:
    if measured is None:
        return "not measured"
    return "pass" if (measured <= needed if at_most else measured >= needed) else "**missed**"


def _status(run: Figures) -> str:
    status = "unfinished" if run["status"] is None else "ok" if run["status"] == 0 else str(run["status"])
    counts = run["last"][-1].strip("= ") if run["job"] == "tests" and run.get("last") else ""
    return f"{status}; {counts}" if counts else status


def _peer(time: float | str | None, ours_us: float | None) -> str:
    if time is None or ours_us is None:
        return "runs"
    return time if isinstance(time, str) else f"{time / ours_us:.2f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _number(value: float | None, layout: str) -> str:
    return NONE if value is None else format(value, layout)


def _gib(num_bytes: int | None) -> str:
    return NONE if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"
