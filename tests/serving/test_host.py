"""What the system's files say of this machine, and which of it is worth advice."""

from dataclasses import replace
from pathlib import Path

import pytest

from serving.host import Host, available_memory_bytes, chosen, cpu_limit, findings, memory_limit, read_host

GIB = 1 << 30
HOST = Host(
    cpu_name="EPYC",
    num_cores=8,
    allowed_cores=8,
    cpu_limit_cores=None,
    flags=frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}),
    load_cores=0.1,
    frequency_governor="performance",
    total_bytes=32 * GIB,
    available_bytes=30 * GIB,
    memory_limit_bytes=None,
    swap_used_bytes=0,
    huge_pages="madvise",
)


def test_a_good_machine_gets_no_advice() -> None:
    """All cores, wide instructions, nothing else running, no swap: facts alone."""
    assert all(finding.advice is None for finding in findings(HOST))


@pytest.mark.parametrize(
    ("change", "threads", "advice"),
    [
        ({}, 4, "8 would use all"),
        ({}, 12, "more threads than cores"),
        ({"cpu_limit_cores": 2.0}, 8, "set engine.threads to 2"),
        ({"cpu_limit_cores": 2.5}, 2, "raise the container's CPU limit"),
        ({"flags": frozenset({"avx2"})}, 8, "float32 may be faster"),
        ({"load_cores": 4.0}, 8, "end other programs"),
        ({"frequency_governor": "powersave"}, 8, "performance"),
        ({"swap_used_bytes": GIB}, 8, "free memory"),
        ({"memory_limit_bytes": 2 * GIB}, 8, "kv_memory_bytes"),
        ({"huge_pages": "never"}, 8, "madvise"),
    ],
)
def test_each_thing_that_costs_speed_is_told_with_its_cure(change, threads, advice) -> None:
    """One change to a good machine gives advice about that change alone."""
    given = [finding for finding in findings(replace(HOST, **change), threads) if finding.advice]
    assert len(given) == 1 and advice in given[0].advice
    assert str(given[0]).count("\n") == 1


def test_control_groups_are_read_as_the_kernel_writes_them() -> None:
    """Version 2's cpu.max and memory.max; "max", and a limit above the machine, limit nothing."""
    assert cpu_limit("250000 100000") == 2.5
    assert [cpu_limit(text) for text in ("max 100000", "max", None)] == [None, None, None]
    assert memory_limit(str(GIB), 4 * GIB) == GIB
    assert [memory_limit(text, 4 * GIB) for text in ("max", None, str(8 * GIB))] == [None, None, None]
    assert (chosen("always [madvise] never"), chosen("none"), chosen(None)) == ("madvise", None, None)


def test_a_machines_files_become_its_facts(tmp_path: Path) -> None:
    """Flags, name and the limit of the process's own cgroup come from files under the root."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name\t: Test CPU\nflags\t: fma avx2\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/b/cpu.max").write_text("150000 100000\n")
    host = read_host(tmp_path)
    assert (host.cpu_name, host.flags, host.cpu_limit_cores) == ("Test CPU", {"fma", "avx2"}, 1.5)
    assert host.usable_cores == 1 and host.huge_pages is None and host.memory_limit_bytes is None


def test_this_machine_can_be_read() -> None:
    """On whatever runs the tests there is a core, some memory, and something to say."""
    host = read_host()
    assert host.usable_cores >= 1 and 0 < host.available_bytes <= host.total_bytes
    assert findings(host)


def test_a_containers_limit_bounds_what_is_available(tmp_path) -> None:
    """What the limit leaves, file cache that can be dropped included; without a limit the machine's own."""
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("50000000\n")
    (folder / "memory.current").write_text("30000000\n")
    (folder / "memory.stat").write_text("anon 20000000\ninactive_file 4000000\n")
    assert available_memory_bytes(tmp_path) == 24_000_000
    (folder / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 100_000_000
