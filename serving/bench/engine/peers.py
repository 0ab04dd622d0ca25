"""Other engines, each a process in its own Python environment that runs a script of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import SearoomError

FOLDER = Path(__file__).parent
SCRIPTS = {
    "transformers": FOLDER / "peer_transformers.py",
    "transformers-batching": FOLDER / "peer_transformers_batching.py",
    "llama.cpp": FOLDER / "peer_llama_cpp.py",
    "vllm": FOLDER / "peer_vllm.py",
}
LOAD_TIMEOUT_S = 600.0
REPLY_TIMEOUT_S = 900.0


class PeerFailed(SearoomError):
    """A peer does not start, or ended; says what its last words were and what to do."""


@dataclass(frozen=True)
class PeerSpec:
    """`name` is a key of SCRIPTS, `python` the interpreter of the environment it is installed in."""

    name: str
    python: Path
    script: Path

    @classmethod
    def named(cls, name: str, python: str) -> PeerSpec:
        """Raises PeerFailed when there is no such peer or no such interpreter."""
        if name not in SCRIPTS:
            raise PeerFailed(f"--peer {name}: no such peer; choose from {', '.join(SCRIPTS)}")
        path = Path(python).expanduser().absolute()  # not resolved: a link is what makes an environment
        if not path.is_file():
            raise PeerFailed(
                f"--peer-python {python}: there is no such file; `tests/benchmarks/peers.sh FOLDER` makes "
                f"{name}'s environment"
            )
        return cls(name, path, SCRIPTS[name])


@dataclass(frozen=True)
class PeerOutput:
    elapsed_s: float
    token_times_s: tuple[tuple[float, ...], ...]
    output_ids: tuple[tuple[int, ...], ...]


class Peer:
    """A running peer. One request at a time; `close` ends it."""

    def __init__(
        self, spec: PeerSpec, model: Path, threads: int, max_batch: int, max_tokens: int, device: str = "cpu"
    ) -> None:
        """Start it and wait until its model is loaded. Raises PeerFailed."""
        self.name = spec.name
        self._spec = spec
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [str(spec.python), str(spec.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=peer_environment(spec, threads),
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read_lines, name=f"peer-{spec.name}", daemon=True).start()
        options = {
            "model": str(model),
            "threads": threads,
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "device": device,
        }
        loaded = self._ask(options, LOAD_TIMEOUT_S)
        self.description = str(loaded["description"])

    def generate(self, prompts: list[list[int]], new_tokens: int | list[int]) -> PeerOutput:
        """Greedy, exactly `new_tokens` for each prompt, or so many for each. Raises PeerFailed.

        Only "transformers-batching" takes numbers that differ.
        """
        reply = self._ask({"prompts": prompts, "new_tokens": new_tokens}, REPLY_TIMEOUT_S)
        output = PeerOutput(
            elapsed_s=float(reply["elapsed_s"]),
            token_times_s=tuple(map(tuple, reply["token_times_s"])),
            output_ids=tuple(map(tuple, reply["output_ids"])),
        )
        lengths = [len(ids) for ids in output.output_ids]
        wanted = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        if lengths != wanted:
            raise PeerFailed(f"{self.name} answered with {lengths} tokens where {wanted} were asked for")
        return output

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended before, and something was left to send
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except (BrokenPipeError, queue.Empty) as silent:
            raise self._failed(f"gave no answer within {timeout_s:.0f} s") from silent
        if line is None:
            raise self._failed(f"ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _failed(self, what: str) -> PeerFailed:
        if self._process.poll() is None:
            self._process.kill()
        self._log.seek(0)
        words = [line.strip() for line in self._log if line.strip()]
        return PeerFailed(
            f"{self.name} ({self._spec.python}) {what}: {words[-1] if words else 'it said nothing'}. "
            "`tests/benchmarks/peers.sh FOLDER` makes or mends its environment"
        )


def peer_environment(spec: PeerSpec, threads: int) -> dict[str, str]:
    """What its maintainers recommend for the most speed; nothing is fetched over the network."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "GOMP_", "PYTHON"))
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.name == "vllm":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment |= {
            "LD_PRELOAD": ":".join(map(str, vllm_preloads(spec.python))),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
    return environment


def vllm_preloads(python: Path) -> list[Path]:
    """tcmalloc and Intel's OpenMP as peers.sh leaves them in vLLM's environment. Raises PeerFailed."""
    lib = python.parent.parent / "lib"
    found = [
        next(iter(sorted(lib.glob(pattern))), None) for pattern in ("libtcmalloc_minimal.so*", "libiomp5.so")
    ]
    if None in found:
        raise PeerFailed(
            f"vllm: {lib} lacks libtcmalloc_minimal.so or libiomp5.so, without which it is slower than it "
            "can be: run tests/benchmarks/peers.sh FOLDER again"
        )
    return [path for path in found if path is not None]
