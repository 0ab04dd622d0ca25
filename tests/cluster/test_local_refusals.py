"""What `LocalCluster` refuses, and how it says why. No cluster gets up here."""

import os
import socket
import stat
from pathlib import Path

import pytest

from cluster.local import ClusterStartError, LocalCluster, NodeSpec


def test_a_dashboard_port_in_use_is_named(tmp_path: Path) -> None:
    """The port is probed before anything starts, and the environment stays as it was."""
    before = dict(os.environ)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cluster = LocalCluster([NodeSpec()], dashboard_port=port, state_folder=tmp_path)
        with pytest.raises(ClusterStartError, match=f"dashboard port {port} .* is in use"):
            cluster.start()
    assert cluster.pids() == []
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_shows_rays_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error carries Ray's own words; no process, folder or variable stays."""
    monkeypatch.setenv("RAY_GCS_SERVER_PORT", "no port")
    before = dict(os.environ)
    cluster = LocalCluster([NodeSpec()], state_folder=tmp_path)
    with pytest.raises(ClusterStartError, match="did not start") as failed:
        cluster.start()
    assert "invalid literal for int() with base 10: 'no port'" in str(failed.value)
    assert cluster.pids() == [] and not cluster._folder.exists()
    assert dict(os.environ) == before


def test_what_ray_cannot_do_is_refused_at_once(tmp_path: Path) -> None:
    """No node, an object store below Ray's least, a folder too long for a Unix socket's path."""
    with pytest.raises(ValueError, match="nodes"):
        LocalCluster([])
    with pytest.raises(ValueError, match="object_store_bytes"):
        LocalCluster([NodeSpec()], object_store_bytes=1 << 20)
    with pytest.raises(ValueError, match="folder"):
        LocalCluster([NodeSpec()], folder=tmp_path / ("x" * 40))


def test_the_environment_names_the_token_file_and_never_the_token(tmp_path: Path) -> None:
    """What a user exports holds a path."""
    environment = LocalCluster([NodeSpec()], state_folder=tmp_path).environment
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray_token")
    assert "RAY_AUTH_TOKEN" not in environment


def test_a_token_others_can_read_is_replaced(tmp_path: Path) -> None:
    """A private token is kept between runs; one that was readable for others is not trusted again."""
    from_others = tmp_path / "ray_token"
    from_others.write_text("known to all")
    from_others.chmod(0o644)
    _try_to_start(tmp_path)
    fresh = from_others.read_text()
    assert fresh != "known to all" and stat.S_IMODE(from_others.stat().st_mode) == 0o600
    _try_to_start(tmp_path)
    assert from_others.read_text() == fresh


def _try_to_start(state_folder: Path) -> None:
    """A start that ends right after the token was made: there is no place for its folder."""
    with pytest.raises(NotADirectoryError):
        LocalCluster([NodeSpec()], state_folder=state_folder, folder=Path("/dev/null/folder")).start()
