"""Every figure of the GPU path in one call, or part by part.

    python tests/benchmarks/gpu.py OUT [PART ...] [--minutes M] [--rehearse]

Jobs run one after the other, each in a process with a time limit, and what fails does not hold up the
next. OUT receives, as it comes, so that a run that is cut short keeps what it has:

    machine.json    device, driver, versions, revision
    runs.json       each job's command, status and seconds
    JOB.json        its figures
    log.txt         all that jobs said
    summary.md      a page made of it all, with what lies in folders below OUT; `summary` makes it anew

With `--minutes` no job goes on for longer than is left of them. `--rehearse` runs everything on a CPU, in
tiny. It needs Searoom's dependencies in the interpreter that runs it, but Ray, and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_summary import summary  # beside this file

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "filelock", "gguf", "huggingface_hub", "jinja2", "msgspec", "numpy", "psutil", "pydantic", "pynvml",
    "rich", "safetensors", "tokenizers", "torch", "transformers", "typer", "yaml",
)  # fmt: skip
VERSIONS = ("torch", "triton", "transformers", "numpy", "safetensors")
GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory")
LIBRARIES = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "gpus": torch.cuda.device_count(),
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    "capability": torch.cuda.get_device_capability() if cuda else None,
}))
"""
KILL_AFTER_S = 5.0
TOLD_LINES = 15


@dataclass(frozen=True)
class Job:
    """`python` with these arguments. With `writes_json` it writes the figures to OUT/NAME.json."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    writes_json: bool = True
    leaves: Path | None = None  # a folder that is deleted afterwards


def parts(rehearse: bool) -> dict[str, list[Job]]:
    """Jobs by part, in the order in which all run; each part's limits add up to less than ten minutes."""
    device = "cpu" if rehearse else "cuda"

    def engine(name: str, config: str, limit_s: float, *options: str, repeats: int = 3) -> Job:
        sizes = ("--rehearse", "--threads", "1") if rehearse else ()
        command = ("-m", "serving.bench", "engine", "--device", device, "--random-weights")
        config = "tiny" if rehearse else config
        count = str(1 if rehearse else repeats)
        return Job(name, (*command, "--model-config", config, "--repeats", count, *sizes, *options), limit_s)

    def peer(name: str, config: str, requests: int, limit_s: float) -> Job:
        options = ("--workload", "batch", "--requests", str(requests), "--peer", "transformers-batching")
        return engine(name, config, limit_s, *options, repeats=1)

    def narrow(dtype: str, kv_dtype: str, workload: str) -> Job:
        options = ("--dtype", dtype, "--kv-dtype", kv_dtype, "--workload", workload)
        name = f"narrow-{dtype if kv_dtype == 'auto' else kv_dtype}"
        if rehearse and dtype != "int8":  # a CPU has no other
            options = options[2:]
        return engine(name, "llama-3-8b", 140, *options, repeats=1)

    weights = Path(tempfile.gettempdir()) / f"searoom-random-weights-{os.getpid()}"  # 16 GB
    startup = engine("startup", "llama-3-8b", 400, "--startup", str(weights), repeats=2)
    families = ("--only", "rms_norm", "--only", "paged_decode")
    sums = ("--ranks", "1,2", "--largest-mib", "1") if rehearse else ()
    return {
        "tests": [Job("tests", _gpu_tests(rehearse), 540, writes_json=False)],
        "collectives": [
            Job("collectives", ("-m", "serving.bench", "collectives", "--device", device, *sums), 120)
        ],
        "kernels": [
            Job("kernels", ("-m", "kernels.bench", *(("--rehearse", *families) if rehearse else ())), 560)
        ],
        "engine-0.6b": [engine("engine-0.6b", "qwen3-0.6b", 400)],
        "engine-8b": [engine("engine-8b", "llama-3-8b", 560)],
        "narrow": [
            narrow("int8", "auto", "decode"),
            narrow("int4", "auto", "decode"),
            narrow("float8", "auto", "decode"),
            narrow("bfloat16", "float8_e4m3", "context"),
        ],
        "startup": [replace(startup, leaves=weights)],
        "peer-0.6b": [
            peer("peer-0.6b-64", "qwen3-0.6b", 64, 220),
            peer("peer-0.6b-256", "qwen3-0.6b", 256, 340),
        ],
        "peer-8b": [peer("peer-8b-64", "llama-3-8b", 64, 240), peer("peer-8b-256", "llama-3-8b", 256, 340)],
    }


def _gpu_tests(rehearse: bool) -> tuple[str, ...]:
    """The files that have tests for a GPU alone: others may need what is not installed."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in found if "mark.gpu" in path.read_text()]
    flags = ("--collect-only",) if rehearse else ("--durations=10", "--continue-on-collection-errors")
    return ("-m", "pytest", "-m", "gpu", *flags, "-p", "no:cacheprovider", *files)


def main() -> int:
    """Run what the arguments name; the number of jobs that failed."""
    options = _arguments()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.parts == ["summary"]:
        _write(out / "summary.md", summary(out))
        return 0
    by_part = parts(options.rehearse)
    wanted = list(by_part) if options.parts in ([], ["all"]) else options.parts
    if unknown := [name for name in wanted if name not in by_part]:
        sys.exit(f"error: there is no part {unknown[0]}: choose from {', '.join(by_part)}, all, summary")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(missing)}: install Searoom's dependencies (not Ray)"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    ends_s = time.monotonic() + 60 * options.minutes
    _write(out / "machine.json", json.dumps(machine(options.rehearse), indent=1))
    failed = 0
    earlier = out / "runs.json"
    runs: list[dict[str, Any]] = json.loads(earlier.read_text()) if earlier.exists() else []
    for job in (job for part in wanted for job in by_part[part]):
        runs = [run for run in runs if run["job"] != job.name]
        runs.append({"job": job.name, "started": datetime.now(UTC).isoformat(timespec="seconds")})
        for found in run(job, out, min(job.limit_s, ends_s - time.monotonic())):
            runs[-1] |= found
            _write(out / "runs.json", json.dumps(runs, indent=1))
            _write(out / "summary.md", summary(out))
        failed += runs[-1]["status"] != 0
    print(f"{out / 'summary.md'}: {failed} of the jobs failed", flush=True)
    return failed


def run(job: Job, out: Path, limit_s: float) -> Iterator[dict[str, Any]]:
    """Yields what is known of the job: its command before it runs, its status and seconds after."""
    json_file = out / f"{job.name}.json"
    arguments = (*job.arguments, *(("--json", str(json_file)) if job.writes_json else ()))
    command = " ".join(["python", *job.arguments])
    yield {"command": command, "status": None, "seconds": None, "limit_s": round(limit_s)}
    if limit_s <= 0:
        yield {"status": "no time was left", "seconds": 0.0}
        return
    print(f"\n== {job.name} (at most {limit_s:.0f} s): {command}", flush=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
    }
    started_s = time.monotonic()
    with (out / "log.txt").open("a+", errors="replace") as log:
        print(f"\n== {command}", file=log, flush=True)
        said_from = log.tell()
        # A group, so that what it starts ends with it; no session, so that it ends with whoever runs this.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            _end(process)
            if job.leaves is not None:
                shutil.rmtree(job.leaves, ignore_errors=True)
        log.seek(said_from)
        lines = log.read().splitlines()
    print("\n".join(lines[-TOLD_LINES:]), flush=True)
    seconds = round(time.monotonic() - started_s, 1)
    print(f"== {job.name}: {status}, {seconds} s", flush=True)
    yield {"status": status, "seconds": seconds, "last": [line for line in lines if line.strip()][-3:]}


def machine(rehearse: bool) -> dict[str, Any]:
    """What the figures were measured on. What cannot be found out is None."""
    smi = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    libraries = _output(sys.executable, "-c", LIBRARIES)
    installed = {
        found.metadata["Name"].lower() for found in metadata.distributions() if found.metadata["Name"]
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": rehearse,
        "gpus": [
            dict(zip(GPU_FIELDS, (field.strip() for field in line.split(",")), strict=False))
            for line in (smi or "").splitlines()
        ],
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in VERSIONS if name in installed},
        "libraries": json.loads(libraries.splitlines()[-1]) if libraries else None,
        "revision": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The job, and whatever it started."""
    for kind, wait_s in ((signal.SIGTERM, KILL_AFTER_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _output(*command: str) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _cpu() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _write(path: Path, content: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(content.rstrip() + "\n")
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main())
