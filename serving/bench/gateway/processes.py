"""CPU time of a cluster's processes, by what they do."""

from __future__ import annotations

import os

import msgspec
import psutil

INGRESS, ROUTER, PROXY = "Ingress", "Router", "HTTP proxy"
REPLICAS, RAY = "ModelReplica and ranks", "Ray, the rest"
ROLES = (INGRESS, ROUTER, PROXY, REPLICAS, RAY)
# What a process of each is called: Ray titles an actor's by its class, a Serve replica's by its deployment.
_TITLES = {
    INGRESS: (":Ingress",),
    ROUTER: (":Router",),
    PROXY: ("ProxyActor", "HAProxyManager", "haproxy"),
    REPLICAS: (":ModelReplica", "ray::Rank"),
}


class CpuClock(msgspec.Struct, frozen=True):
    """CPU seconds (user and system, all threads) of every process so far."""

    seconds: dict[str, dict[int, float]]  # role → process id → seconds

    def since(self, earlier: CpuClock) -> dict[str, float]:
        """Seconds a role between the two. A process that ended in between is not counted."""
        return {
            role: sum(
                seconds - earlier.seconds[role].get(pid, 0.0) for pid, seconds in self.seconds[role].items()
            )
            for role in ROLES
        }


def read_clock() -> CpuClock:
    """Of all processes this one started, and theirs."""
    seconds: dict[str, dict[int, float]] = {role: {} for role in ROLES}
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            times = process.cpu_times()
            seconds[_role(process)][process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return CpuClock(seconds)


def _role(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    return next((role for role, names in _TITLES.items() if any(name in title for name in names)), RAY)
