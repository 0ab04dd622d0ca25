"""The configuration: checked once, at the edge, by names a person can find."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.regions import pretend
from serving.config import SearoomConfig, parse_config, read_config
from serving.errors import ConfigError

SERVE = """
applications:
  - {name: other, import_path: other.app:build}
  - name: searoom
    import_path: serving.app:build
    args: {engine: {kv_blocks: 64}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "searoom.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"enigne": {}}, "enigne"),
        ({"engine": {"kv_bloks": 1}}, "engine.kv_bloks"),
        ({"regions": [{"name": "a", "size": 2}]}, "regions.0.size"),
        ({"ingress": {"auth": {"keys": []}}}, "ingress.auth.keys"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_path(args, key):
    """Nothing misspelt is dropped in silence."""
    with pytest.raises(ConfigError, match=f"^my.yaml: unknown key '{key}'"):
        parse_config(args, "my.yaml")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"engine": {"kv_blocks": 0}}, "engine.kv_blocks: "),
        ({"engine": {"device": "tpu"}}, "engine.device: "),
        ({"engine": {"host_kv_bytes": 0}}, "engine.host_kv_bytes: "),
        ({"engine": {"sleep_after_s": 60}}, "sleep_after_s: gives a GPU's memory back; leave it out, or set"),
        ({"ingress": {"request_timeout_s": 0}}, "ingress.request_timeout_s: "),
        ({"regions": [{"name": "EU West"}]}, "regions.0.name: "),
        ({"regions": []}, "at least one region"),
        ({"regions": [{"name": "a"}, {"name": "a"}], "pin_regions": True}, "names a region twice"),
        ({"home_region": "eu"}, "home_region: 'eu' is not one of"),
        ({"regions": [{"name": "a"}, {"name": "b"}]}, "pin_regions: must be true"),
        ({"engine": {"kv_dtype": "int8"}}, "engine.kv_dtype: "),
        ({"model": {"dtype": "int4"}}, "model.dtype: int4 needs engine.device cuda"),
        ({"model": {"dtype": "float8"}}, "model.dtype: float8 needs engine.device cuda"),
        ({"cluster_file": "f", "cluster_map": pretend(["local"]).model_dump()}, "not both"),
    ],
)
def test_what_cannot_be_is_said_with_its_key(args, said):
    """Wrong values and regions that contradict each other: the message holds the key, or the fix."""
    with pytest.raises(ConfigError, match=r"^my\.yaml: ") as refused:
        parse_config(args, "my.yaml")
    assert said in str(refused.value)


def test_every_mistake_is_told_at_once():
    """Two mistakes, two lines."""
    with pytest.raises(ConfigError) as refused:
        parse_config({"a": 1, "engine": {"threads": 0}}, "my.yaml")
    assert len(str(refused.value).splitlines()) == 2


def test_a_key_in_the_clear_is_refused_and_not_repeated():
    """A config carries digests; the error does not print what was given."""
    with pytest.raises(ConfigError, match="SHA-256 hex digest") as refused:
        parse_config({"ingress": {"auth": {"key_sha256": ["sk-canary"]}}}, "my.yaml")
    assert "sk-canary" not in str(refused.value)


def test_blocks_of_another_kv_dtype_are_other_blocks():
    """What Ingress hashes tells apart every dtype that changes keys and values."""
    configs = [
        {},
        {"model": {"dtype": "float32"}},
        {"engine": {"kv_dtype": "float8_e4m3"}},
        {"model": {"dtype": "float8"}, "engine": {"device": "cuda"}},
    ]
    identities = [parse_config(config, "x").kv_identity for config in configs]
    assert len(set(identities)) == len(configs)
    assert identities[0] == parse_config({"model": {"dtype": "bfloat16"}}, "x").kv_identity


def test_a_config_is_frozen():
    """Nobody changes it after it was checked."""
    with pytest.raises(ValidationError):
        SearoomConfig().home_region = "eu"  # type: ignore[misc]


def test_home_is_the_first_region_unless_said():
    """Ingress and Router stand there."""
    regions = [{"name": "us"}, {"name": "eu"}]
    assert parse_config({"regions": regions, "pin_regions": True}, "x").home == "us"
    assert parse_config({"regions": regions, "pin_regions": True, "home_region": "eu"}, "x").home == "eu"


def test_a_file_holds_our_keys_or_a_serve_config_with_them(tmp_path):
    """The same reader takes both; in a Serve config only our application is looked at."""
    assert read_config(written(tmp_path, "engine: {kv_blocks: 64}")).engine.kv_blocks == 64
    assert read_config(written(tmp_path, SERVE)).engine.kv_blocks == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("applications: 3", "must be a list"),
        ("applications: []", "exactly one with import_path serving.app:build, found 0"),
        ("applications: [{import_path: 'serving.app:build', args: {x: 1}}]", "unknown key 'x'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, said):
    """The error begins with the file's path."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    assert str(refused.value).startswith(f"{path}: ") and said in str(refused.value)
    with pytest.raises(ConfigError, match="there is no such file"):
        read_config(tmp_path / "absent.yaml")
