"""What `python -m serving.bench engine` does on a GPU, or of a config: from its options to its report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from serving.bench.engine import startup, workload_session
from serving.bench.engine.offline import EngineSetup
from serving.bench.engine.peers import PeerSpec
from serving.bench.engine.workloads import KINDS, REHEARSAL, Kind, Scale
from serving.errors import ConfigError

_TABLE_WIDTH = 160  # of tables that go to a file


@dataclass(frozen=True, kw_only=True)
class WorkloadCommand:
    """The options. `config` needs `random_weights`, and the other way round; `setup` is for all else."""

    setup: EngineSetup
    config: str | None
    random_weights: bool
    workloads: tuple[str, ...]
    requests: int
    startup_folder: Path | None
    rehearse: bool
    repeats: int
    peers: tuple[str, ...]
    peer_pythons: tuple[str, ...]
    json_file: Path | None

    def run(self, console: Console) -> bool:
        """Whether all could be measured. Raises ConfigError, ModelFileError or PeerFailed."""
        if not console.is_terminal:
            console = Console(width=_TABLE_WIDTH)
        setup = self._setup()
        command = f"python -m serving.bench {shlex.join(sys.argv[1:])}"
        if self.startup_folder is not None:
            plan = startup.StartupPlan(setup, self.startup_folder, self.repeats, command, self.json_file)
            startup.run(plan, console)
            return True
        report = workload_session.run(
            workload_session.WorkloadPlan(
                setup=setup,
                kinds=self._kinds(),
                scale=REHEARSAL if self.rehearse else Scale(requests=self.requests),
                repeats=self.repeats,
                peers=self._peers(),
                command=command,
                json_file=self.json_file,
            ),
            console,
        )
        return not report.failures

    def _setup(self) -> EngineSetup:
        if self.config is None:
            if self.random_weights:
                raise ConfigError("--random-weights: of what? Add --model-config")
            return self.setup
        if not self.random_weights:
            raise ConfigError("--model-config has no weights: add --random-weights, or give --model instead")
        folder = workload_session.config_folder(self.config)
        return replace(self.setup, source=str(folder), random_weights=True)

    def _kinds(self) -> tuple[Kind, ...]:
        if unknown := set(self.workloads) - set(KINDS):
            raise ConfigError(f"--workload {unknown.pop()}: choose from {', '.join(KINDS)}")
        return tuple(kind for kind in KINDS if kind in self.workloads)

    def _peers(self) -> tuple[PeerSpec, ...]:
        """In this interpreter where no other is given."""
        pythons = self.peer_pythons or (sys.executable,) * len(self.peers)
        if len(pythons) != len(self.peers):
            raise ConfigError("--peer-python: give one for each --peer, or none where this one has them all")
        return tuple(PeerSpec.named(*pair) for pair in zip(self.peers, pythons, strict=True))
