"""The state file: found while its process lives, and never believed after."""

import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from serving import running
from serving.auth import state_folder
from serving.errors import ConfigError
from serving.running import Running


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return state_folder() / "running.json"


@pytest.fixture
def here() -> Running:
    return Running.here(endpoint="http://127.0.0.1:1", dashboard="http://d", model="m", ray_address="r")


def test_what_was_saved_is_found_until_it_is_forgotten(here):
    """Another command of the same user sees the same cluster; forgetting twice is no error."""
    assert running.find() is None
    running.save(here)
    assert running.find() == running.require() == here
    running.save(replace(here, ready=True))
    assert running.require().ready
    running.forget()
    running.forget()
    with pytest.raises(ConfigError, match="searoom up"):
        running.require()


def test_a_dead_process_is_not_running(here, path):
    """After a crash the file is left over; it is removed, and says nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    running.save(replace(here, pid=process.pid))
    assert running.find() is None and not path.exists()


def test_a_process_that_ended_and_was_not_reaped_is_not_running(here):
    """A zombie still has its number and its start time: `down` must not wait for it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    zombie = psutil.Process(process.pid)
    zombies_cluster = replace(here, pid=process.pid, started_s=zombie.create_time())
    assert zombies_cluster.alive()
    process.stdin.close()
    while zombie.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not zombies_cluster.alive()
    process.wait()


def test_a_reused_process_id_is_not_ours(here, path):
    """The process of that number started at another time: `down` must not end a stranger."""
    running.save(replace(here, started_s=here.started_s - 60))
    assert running.find() is None and not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "shoe_size": 43}'])
def test_a_file_that_is_cut_off_or_of_another_version_is_nothing(path, content):
    """It is dropped, so that `searoom up` works again."""
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert running.find() is None and not path.exists()


def test_the_file_holds_no_key(here, path):
    """What it holds is what `Running` lists, and nothing else is written beside it."""
    running.save(here)
    assert set(asdict(here)) == {"pid", "started_s", "endpoint", "dashboard", "model", "ray_address", "ready"}
    assert list(path.parent.iterdir()) == [path]
