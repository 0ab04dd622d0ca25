"""`searoom up` before anything starts: flags over the config file, the port, the memory."""

import os
import socket
from pathlib import Path

import psutil
import pytest
import yaml

from serving.app import make_plan
from serving.auth import digest_of
from serving.config import MockEngineConfig
from serving.errors import ConfigError
from serving.up import UpOptions, _require_free_port, _require_memory, merge

DIGEST = digest_of("sk-test")


def written(folder: Path, **content: object) -> Path:
    path = folder / "searoom.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_without_flags_it_is_the_embedded_default_on_all_cores():
    """One region, one replica, and the machine's cores for its one rank; the key as a digest."""
    config = merge(UpOptions(), DIGEST)
    assert config.model.source == "embedded" and config.engine.threads == os.cpu_count()
    assert [(region.name, region.replicas) for region in config.regions] == [("local", 1)]
    assert config.ingress.auth.key_sha256 == (DIGEST,) and not config.pin_regions


def test_ingress_listens_itself_on_a_cluster_of_its_own_only(tmp_path):
    """On this machine's loopback, whatever the file says; a cluster that was joined keeps the file's word."""
    path = written(tmp_path, ingress={"host": "0.0.0.0", "port": 80})
    ours = merge(UpOptions(config=path, port=8123), DIGEST).ingress
    assert (ours.host, ours.port) == ("127.0.0.1", 8123)
    joined = merge(UpOptions(config=path, address="10.0.0.1:6379"), DIGEST).ingress
    assert (joined.host, joined.port) == ("0.0.0.0", 80)


def test_flags_go_over_the_file_and_leave_its_other_keys(tmp_path):
    """What a flag does not say stays as written; the file's key is replaced by the one in use."""
    path = written(
        tmp_path,
        model={"source": "some/folder", "name": "mine"},
        engine={"kv_blocks": 64, "max_num_seqs": 4},
        ingress={"auth": {"key_file": "/keys"}, "max_body_bytes": 1000},
    )
    config = merge(UpOptions(config=path, kv_blocks=128, dtype="bfloat16"), DIGEST)
    assert (config.model.source, config.model.name, config.model.dtype) == ("some/folder", "mine", "bfloat16")
    assert (config.engine.kv_blocks, config.engine.max_num_seqs) == (128, 4)
    assert config.ingress.max_body_bytes == 1000
    assert config.ingress.auth.key_sha256 == (DIGEST,) and config.ingress.auth.key_file is None


def test_pretend_regions_are_pinned_and_far_apart():
    """Each is a node with its label, and their round trips are waited for."""
    config = merge(
        UpOptions(regions=("us-east", "eu-west"), replicas_per_region=2, home_region="eu-west"), DIGEST
    )
    assert [(region.name, region.replicas) for region in config.regions] == [("us-east", 2), ("eu-west", 2)]
    assert config.home == "eu-west" and config.pin_regions and config.routing.pretend_rtt


def test_replicas_per_region_alone_keeps_the_files_regions(tmp_path):
    """The flag says how many, the file says where."""
    path = written(tmp_path, regions=[{"name": "a"}, {"name": "b"}], pin_regions=True)
    config = merge(UpOptions(config=path, replicas_per_region=3), DIGEST)
    assert [(region.name, region.replicas) for region in config.regions] == [("a", 3), ("b", 3)]
    assert not config.routing.pretend_rtt


def test_a_mock_engine_is_asked_for_by_a_flag_or_in_the_file(tmp_path):
    """The flag alone takes the defaults; the file's own figures stay, but for the one that a flag names."""
    assert merge(UpOptions(), DIGEST).engine.mock is None
    assert merge(UpOptions(mock_engine=True), DIGEST).engine.mock == MockEngineConfig()
    path = written(tmp_path, engine={"mock": {"base_ms": 3, "mean_output_tokens": 50}})
    assert merge(UpOptions(config=path), DIGEST).engine.mock.base_ms == 3
    both = merge(UpOptions(config=path, mock_engine=True, mock_step_ms=7), DIGEST).engine.mock
    assert (both.base_ms, both.mean_output_tokens) == (7, 50)
    with pytest.raises(ConfigError, match="give --mock-engine"):
        merge(UpOptions(mock_step_ms=7), DIGEST)


@pytest.mark.parametrize(("tp", "replicas"), [(1, 2), (3, 1), (3, 50)])
def test_ranks_on_one_machine_share_its_cores(tp, replicas):
    """Together they use no more threads than there are cores, and each has one at least."""
    config = merge(UpOptions(tp=tp, replicas_per_region=replicas), DIGEST)
    threads = config.engine.threads
    assert threads == max(1, (os.cpu_count() or 1) // (tp * replicas))


def test_threads_are_left_alone_where_they_are_given_or_the_cores_are_not_ours(tmp_path):
    """A joined cluster's nodes are divided by their replicas; a number in the file is a wish."""
    assert merge(UpOptions(address="10.0.0.1:6379"), DIGEST).engine.threads is None
    path = written(tmp_path, engine={"threads": 7})
    assert merge(UpOptions(config=path), DIGEST).engine.threads == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (UpOptions(home_region="mars"), "home_region"),
        (UpOptions(regions=("a", "a")), "names a region twice"),
        (UpOptions(regions=("US East",)), "regions.0.name"),
        (UpOptions(dtype="int4"), "model.dtype"),
        (UpOptions(mock_engine=True, tp=3), "mock: has one rank"),
    ],
)
def test_a_flag_that_cannot_be_met_is_named(options, said):
    """As for a file: what is wrong, by its key."""
    with pytest.raises(ConfigError) as refused:
        merge(options, DIGEST)
    assert said in str(refused.value)


def test_a_port_in_use_is_refused_even_where_it_could_be_shared():
    """Serve's proxy shares ports by SO_REUSEPORT: two clusters would answer on one port by turns."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: port {port} on 127.0.0.1 is in use"):
            _require_free_port(port, "--port")
    _require_free_port(port, "--port")


def test_a_pool_larger_than_memory_is_refused_with_what_would_fit(embedded_model):
    """All replicas' pools count; the number that the error gives is accepted."""
    spec_bytes = 2 * 30 * 3 * 64 * 2 * 16  # K and V, layers, KV heads, head dim, bfloat16, tokens a block
    free = psutil.virtual_memory().available
    too_many = free // spec_bytes  # fits once, not twice
    with pytest.raises(ConfigError, match=r"--kv-blocks: .* in each of 2 replicas") as refused:
        _require_memory(make_plan(merge(UpOptions(kv_blocks=too_many, replicas_per_region=2), DIGEST)))
    at_most = int(str(refused.value).split("at most ")[1].split()[0])
    assert at_most == pytest.approx(free / spec_bytes / 2, rel=0.1)
    _require_memory(make_plan(merge(UpOptions(kv_blocks=at_most // 2, replicas_per_region=2), DIGEST)))
    mock = UpOptions(kv_blocks=too_many, replicas_per_region=2, mock_engine=True)
    _require_memory(make_plan(merge(mock, DIGEST)))  # counts blocks, and keeps nothing in them
    _require_memory(make_plan(merge(UpOptions(), DIGEST)))  # measured, so it fits by itself
