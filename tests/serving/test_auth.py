"""Keys: who is let in, and where a key may lie."""

import multiprocessing
import re
import stat
from pathlib import Path

import pytest

from serving.auth import KeyRing, digest_of, key_digests, load_key, state_folder
from serving.config import AuthConfig
from serving.errors import ConfigError, InvalidApiKey

KEY, OTHER = "sk-first", "sk-second"


@pytest.fixture
def ring() -> KeyRing:
    return KeyRing((digest_of(KEY), digest_of(OTHER)))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {digest_of(KEY)}",
        "Bearer é",
    ],
)
def test_without_a_known_key_nobody_is_let_in(ring, header):
    """Missing, malformed, unknown, and a stolen digest: 401, and the key is not repeated."""
    with pytest.raises(InvalidApiKey) as refused:
        ring.authenticate(header)
    assert refused.value.status == 401 and KEY not in str(refused.value)


def test_a_ring_without_keys_lets_nobody_in():
    """No key configured is no open door."""
    with pytest.raises(InvalidApiKey):
        KeyRing(()).authenticate(f"Bearer {KEY}")


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "])
def test_a_caller_is_the_same_however_the_header_is_written(ring, header):
    """The scheme has no case; the tenant follows from the key alone, and tells nothing of it."""
    caller = ring.authenticate(header)
    assert caller == KeyRing((digest_of(KEY),)).authenticate(f"Bearer {KEY}")
    assert re.fullmatch("[0-9a-f]{32}", caller.tenant_key)
    assert caller.tenant_key != ring.authenticate(f"Bearer {OTHER}").tenant_key
    assert caller.tenant_key not in digest_of(KEY) and KEY not in repr(caller)


def test_the_key_file_is_made_once_for_its_owner_alone(tmp_path, monkeypatch):
    """The second call reads what the first wrote: 256 random bits, readable by nobody else."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key = load_key()
    path = state_folder() / "api_key"
    assert load_key() == key and path.read_text() == key + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
    assert list(path.parent.iterdir()) == [path]
    assert key_digests(AuthConfig()) == (digest_of(key),)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_file_others_can_touch_is_refused(tmp_path, mode):
    """The error names the file and the command that mends it, not the key."""
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}") as refused:
        load_key(path)
    assert KEY not in str(refused.value)


def test_a_key_file_may_hold_several_keys(tmp_path):
    """One a line, empty lines ignored; a list of digests in the config needs no file."""
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n\n  {OTHER}\n")
    path.chmod(0o600)
    assert key_digests(AuthConfig(key_file=str(path))) == (digest_of(KEY), digest_of(OTHER))
    assert key_digests(AuthConfig(key_sha256=(digest_of(KEY),))) == (digest_of(KEY),)


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_a_key_file_that_is_named_must_hold_a_key(tmp_path, content):
    """A missing or empty file is a mistake to be told, not a reason to let nobody or everybody in."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        key_digests(AuthConfig(key_file=str(path)))


def _load_at_once(path: Path, barrier, found) -> None:
    barrier.wait()
    found.put(load_key(path))


def test_processes_that_start_at_once_agree_on_one_key(tmp_path):
    """Ingress replicas and the command line may all be the first."""
    fork = multiprocessing.get_context("fork")
    path, barrier, found = tmp_path / "state" / "api_key", fork.Barrier(6), fork.Queue()
    processes = [fork.Process(target=_load_at_once, args=(path, barrier, found)) for _ in range(6)]
    for process in processes:
        process.start()
    keys = {found.get(timeout=10) for _ in processes}
    for process in processes:
        process.join(10)
    assert keys == {load_key(path)}
    assert list(path.parent.iterdir()) == [path]
