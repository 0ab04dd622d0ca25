"""This machine, as far as it decides an engine's speed: read off the system, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_WIDE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_CGROUP = Path("/sys/fs/cgroup")
_SWAP_NOISE_BYTES = 64 << 20
_BUSY_SHARE = 0.25  # of the cores, wanted by others


@dataclass(frozen=True)
class Finding:
    """A fact, and where it costs speed what would help."""

    fact: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.fact}\n    -> {self.advice}" if self.advice else self.fact


@dataclass(frozen=True, kw_only=True)
class Host:
    """Cores and memory. None where the system does not tell."""

    cpu_name: str
    num_cores: int
    allowed_cores: int  # by this process's affinity
    cpu_limit_cores: float | None  # by its cgroup
    flags: frozenset[str]
    load_cores: float  # mean of the last minute, everyone's
    frequency_governor: str | None
    total_bytes: int
    available_bytes: int
    memory_limit_bytes: int | None  # by its cgroup
    swap_used_bytes: int
    huge_pages: str | None  # transparent ones: always, madvise or never

    @property
    def usable_cores(self) -> int:
        """Threads beyond these would wait for one another."""
        cores = self.allowed_cores
        if self.cpu_limit_cores is not None:
            cores = min(cores, max(1, int(self.cpu_limit_cores)))
        return cores


def read_host(root: Path = Path("/")) -> Host:
    """What /proc and /sys under `root` say, and psutil where it knows."""
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    cgroup = _cgroup_folder(root)
    memory = psutil.virtual_memory()
    num_cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores
    return Host(
        cpu_name=_first_value(cpuinfo, "model name") or "an unnamed CPU",
        num_cores=num_cores,
        allowed_cores=affinity,
        cpu_limit_cores=cpu_limit(_read(cgroup / "cpu.max")),
        flags=frozenset((_first_value(cpuinfo, "flags") or "").split()),
        load_cores=os.getloadavg()[0],
        frequency_governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        total_bytes=memory.total,
        available_bytes=memory.available,
        memory_limit_bytes=memory_limit(_read(cgroup / "memory.max"), memory.total),
        swap_used_bytes=psutil.swap_memory().used,
        huge_pages=chosen(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    )


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, within the container's limit where it has one."""
    available = psutil.virtual_memory().available
    cgroup = _cgroup_folder(root)
    limit = memory_limit(_read(cgroup / "memory.max"), psutil.virtual_memory().total)
    used = _read(cgroup / "memory.current")
    if limit is None or used is None:
        return available
    return max(0, min(available, limit - int(used) + _file_cache_bytes(_read(cgroup / "memory.stat"))))


def _file_cache_bytes(memory_stat: str | None) -> int:
    """Counted as used by a cgroup, and given back when memory is short."""
    pairs = (line.split() for line in (memory_stat or "").splitlines())
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == "inactive_file")


def cpu_limit(cpu_max: str | None) -> float | None:
    """Cores of a cgroup's `cpu.max`, which is "quota period" in microseconds, or "max period"."""
    parts = (cpu_max or "max").split()
    if parts[0] == "max" or len(parts) != 2:
        return None
    return int(parts[0]) / int(parts[1])


def memory_limit(memory_max: str | None, total_bytes: int) -> int | None:
    """Bytes of a cgroup's `memory.max`; None where it limits nothing."""
    if memory_max is None or memory_max == "max" or int(memory_max) >= total_bytes:
        return None
    return int(memory_max)


def chosen(options: str | None) -> str | None:
    """The option in brackets: "always [madvise] never" is madvise."""
    for option in (options or "").split():
        if option.startswith("["):
            return option.strip("[]")
    return None


def findings(host: Host, threads: int | None = None) -> list[Finding]:
    """What is to be known of this machine, for an engine on so many threads (default: all usable)."""
    return list(_findings(host, host.usable_cores if threads is None else threads))


def _findings(host: Host, threads: int) -> Iterator[Finding]:
    yield _cores(host, threads)
    if host.cpu_limit_cores is not None and host.cpu_limit_cores < host.allowed_cores:
        yield Finding(
            f"the container may use {host.cpu_limit_cores:g} cores of them",
            "raise the container's CPU limit"
            if threads <= host.cpu_limit_cores
            else f"set engine.threads to {host.usable_cores}: more are stopped by turns",
        )
    yield _instructions(host.flags)
    if host.load_cores > _BUSY_SHARE * host.allowed_cores:
        yield Finding(
            f"in the last minute {host.load_cores:.1f} cores' worth of programs ran here",
            "end other programs while you measure or serve: a step waits for its slowest thread",
        )
    if host.frequency_governor == "powersave":
        yield Finding("the CPU saves power", "cpupower frequency-set --governor performance")
    yield _memory(host)
    if host.swap_used_bytes > _SWAP_NOISE_BYTES:
        yield Finding(
            f"{_gib(host.swap_used_bytes)} are swapped out",
            "free memory or lower engine.kv_memory_bytes: a weight that is read back from disk costs a step",
        )
    if host.huge_pages is not None:
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(f"huge pages: {host.huge_pages}", advice if host.huge_pages == "never" else None)


def _cores(host: Host, threads: int) -> Finding:
    fact = (
        f"{host.cpu_name}: {host.num_cores} cores, {host.allowed_cores} for this process, {threads} threads"
    )
    if threads < host.usable_cores:
        return Finding(fact, f"engine.threads: {host.usable_cores} would use all cores there are")
    if threads > host.allowed_cores:
        return Finding(fact, f"engine.threads: {host.usable_cores}; more threads than cores wait by turns")
    return Finding(fact)


def _instructions(flags: Iterable[str]) -> Finding:
    present = [flag for flag in _WIDE if flag in set(flags)]
    fact = f"instructions: {', '.join(present) or 'none of ' + ', '.join(_WIDE)}"
    if not {"avx512_bf16", "amx_bf16"} & set(present):
        return Finding(fact, "this CPU has no bfloat16 products; float32 may be faster than bfloat16")
    return Finding(fact)


def _memory(host: Host) -> Finding:
    fact = f"memory: {_gib(host.available_bytes)} of {_gib(host.total_bytes)} available"
    if host.memory_limit_bytes is None:
        return Finding(fact)
    return Finding(
        f"{fact}; the container may use {_gib(host.memory_limit_bytes)}",
        "set engine.kv_memory_bytes so that weights and KV stay below the container's limit"
        if host.memory_limit_bytes < host.available_bytes
        else None,
    )


def _cgroup_folder(root: Path) -> Path:
    """This process's cgroup (version 2), or the root one where its own cannot be seen."""
    mount = root / _CGROUP.relative_to("/")
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            own = mount / line.removeprefix("0::").lstrip("/")
            if (own / "cpu.max").exists():
                return own
    return mount


def _first_value(table: str, key: str) -> str | None:
    """Of the first line "key : value"."""
    for line in table.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
