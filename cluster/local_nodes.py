"""The process that holds a local cluster's Ray nodes. Run by `cluster.local`, never imported.

    owner ──arguments──► this process ──► GCS, dashboard, raylets ──► workers, jobs, their children
      ▲                     │    ▲
      └── one line: ready ──┘    └── a pipe whose end means stop; so does a change of parent

It is a child subreaper: whatever loses its parent anywhere below becomes its child, so that when
the end comes, by request or because the owner died, it can kill all of it. Should this process
itself be killed, the kernel kills the Ray processes that it started, and workers die with them.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import sys
from types import FrameType
from typing import Any

import psutil
from ray.cluster_utils import Cluster

PR_SET_CHILD_SUBREAPER = 36
WATCH_S = 1.0


def main(arguments: dict[str, Any]) -> None:
    """Start `nodes` (keyword arguments of `Cluster.add_node`), say so on `ready_fd`, hold, end."""
    lifeline_fd, ready_fd = arguments["lifeline_fd"], arguments["ready_fd"]
    os.set_inheritable(lifeline_fd, False)
    os.set_inheritable(ready_fd, False)
    owner_pid = os.getppid()
    _become_subreaper()
    signal.signal(signal.SIGTERM, _end)
    cluster = Cluster()
    started = False
    try:
        for node in arguments["nodes"]:
            cluster.add_node(**node)
        signal.signal(signal.SIGTERM, _end)  # each of Ray's nodes has set its own
        ready = {"address": cluster.address, "dashboard": cluster.webui_url}
        os.write(ready_fd, json.dumps(ready).encode() + b"\n")
        os.close(ready_fd)
        started = True
        _hold(lifeline_fd, owner_pid)
        cluster.shutdown()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_descendants()
        if started and arguments["remove_folder"] is not None:  # else the owner wants to read the logs
            shutil.rmtree(arguments["remove_folder"], ignore_errors=True)


def _hold(lifeline_fd: int, owner_pid: int) -> None:
    """Until the owner lets go of the pipe or is dead."""
    while os.getppid() == owner_pid:
        readable, _, _ = select.select([lifeline_fd], [], [], WATCH_S)
        if readable:  # nothing is ever written: this is its end
            return
        _reap()


def _reap() -> None:
    """Collect orphans that have ended. Ray takes a child already collected for one that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def _kill_descendants() -> None:
    """Until none is left: each round's orphans become our children, to be met in the next."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, timeout=0.5)


def _become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
