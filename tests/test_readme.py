"""The README's commands are the program's: flags and subcommands exist, files are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from serving.cli import app
from serving.config import read_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SEAROOM = [line for line in LINES if re.match(r"(\.venv/bin/)?searoom ", line)]


@pytest.mark.parametrize("line", SEAROOM)
def test_every_searoom_command_parses(line):
    """A flag that is renamed must be renamed in the README too."""
    command = get_command(app)
    name, *arguments = shlex.split(line)[1:]
    assert name in command.commands
    if "--help" not in arguments:
        command.commands[name].make_context(name, arguments)


def test_the_two_commands_are_there_and_the_ci_runs_the_second():
    """One command runs the main job, one the tests; .ci/run takes the second from here."""
    marks = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*)\n```", README)
    assert [name for name, _ in marks] == ["run", "test"]
    assert marks[0][1].endswith("searoom up") and marks[1][1].endswith("pytest")
    assert "command: test" in (ROOT / ".ci" / "run").read_text()


def test_every_linked_file_is_there():
    """No link leads nowhere."""
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("line", [line for line in LINES if "manifests/" in line])
def test_manifests_that_are_named_are_valid(line):
    """What the README deploys is a config we accept."""
    (path,) = re.findall(r"manifests/[\w.]+", line)
    assert read_config(ROOT / path).regions
