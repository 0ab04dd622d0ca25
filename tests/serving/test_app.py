"""The composition root without a cluster: what is refused at once, and what is asked of Serve."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import Application

from serving.app import build, make_plan
from serving.auth import digest_of
from serving.config import parse_config
from serving.errors import ConfigError

KEY = "sk-canary"
AUTH = {"auth": {"key_sha256": [digest_of(KEY)]}}
TWO_REGIONS = {
    "regions": [{"name": "us-east", "replicas": 2}, {"name": "eu-west"}],
    "home_region": "eu-west",
    "pin_regions": True,
    "ingress": AUTH,
}

pytestmark = pytest.mark.usefixtures("embedded_model")


def plan_of(args: dict[str, Any]):
    return make_plan(parse_config(args, "test"))


def deployments_of(application: Application) -> dict[str, Any]:
    """Every deployment of an application by name, with `init_args`."""
    found = {}
    bound = application._bound_deployment
    found[bound.name] = bound
    for argument in bound.init_args:
        if isinstance(argument, Application):
            found |= deployments_of(argument)
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_a_split_the_heads_do_not_allow_is_refused(tp):
    """The model has 9 query and 3 KV heads: the error says so, and which splits there are."""
    with pytest.raises(ConfigError, match=r"9 query and 3 KV heads.*splits over 1 or 3") as refused:
        plan_of({"engine": {"tensor_parallel": tp}})
    assert "engine.tensor_parallel" in str(refused.value)


@pytest.mark.parametrize("tp", [1, 3])
def test_a_split_the_heads_allow_gets_one_bundle_a_rank(tp):
    """Each rank and the replica itself have their claim in the group's bundles."""
    application = build({"engine": {"tensor_parallel": tp}, "ingress": AUTH})
    deployment = deployments_of(application)["ModelReplica-smollm2-135m-instruct-local"]
    assert len(deployment._replica_config.placement_group_bundles) == tp
    assert deployment._replica_config.placement_group_strategy == "STRICT_PACK"


def test_a_region_that_the_cluster_file_does_not_know_is_refused(tmp_path):
    """Round trips and fabrics are looked up there; so is a file that is not there."""
    path = tmp_path / "regions.yaml"
    path.write_text(yaml.safe_dump({"regions": [{"name": "us-east"}]}))
    config = {"cluster_file": str(path), "regions": [{"name": "mars"}]}
    with pytest.raises(ConfigError, match=r"regions: mars not in the cluster file"):
        plan_of(config)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        plan_of(config | {"cluster_file": str(tmp_path / "absent.yaml")})


def test_an_application_has_a_deployment_of_replicas_a_region():
    """Ingress in front; one Router; replicas by model and region, as many as were asked for."""
    application = build(TWO_REGIONS)
    found = deployments_of(application)
    assert {name: deployment.num_replicas for name, deployment in found.items()} == {
        "Ingress": 1,
        "Router": 1,
        "ModelReplica-smollm2-135m-instruct-us-east": 2,
        "ModelReplica-smollm2-135m-instruct-eu-west": 1,
    }
    assert application._bound_deployment.name == "Ingress"


def test_regions_are_pinned_by_label():
    """Ingress and Router stand at home, every bundle of a replica in its region."""
    found = deployments_of(build(TWO_REGIONS))
    label = "ray.io/availability-region"
    for name in ("Ingress", "Router"):
        assert found[name].ray_actor_options["label_selector"] == {label: "eu-west"}
    for region in ("us-east", "eu-west"):
        replica = found[f"ModelReplica-smollm2-135m-instruct-{region}"]._replica_config
        assert replica.placement_group_bundle_label_selector == [{label: region}]


def test_a_replica_drains_longer_than_the_longest_request():
    """Otherwise a rolling update would cut streams; and Serve's own limit of 5 calls is lifted."""
    found = deployments_of(build({"ingress": AUTH | {"request_timeout_s": 100.0}}))
    for name, deployment in found.items():
        assert deployment.max_ongoing_requests >= 1000
        if name != "Router":  # its streams never end by themselves
            assert deployment._deployment_config.graceful_shutdown_timeout_s > 100.0


def test_a_name_with_a_slash_makes_a_deployment_name_without():
    """Hub ids have slashes, Serve's names and URLs must not."""
    plan = plan_of({"model": {"name": "org/model"}})
    assert plan.model_name == "org/model" and plan.deployment_name("local") == "ModelReplica-org--model-local"


def test_what_a_replica_is_told_does_not_change_with_the_rest_of_the_fleet():
    """Serve replaces replicas whose arguments change: another region or limit must not touch this one."""
    more = copy.deepcopy(TWO_REGIONS)
    more["regions"] += [{"name": "ap-south"}]  # type: ignore[operator]
    more["ingress"] |= {"request_timeout_s": 100.0}  # type: ignore[operator]
    name = "ModelReplica-smollm2-135m-instruct-us-east"
    before, after = (deployments_of(build(args))[name].init_args for args in (TWO_REGIONS, more))
    assert before == after


def test_no_key_travels_in_arguments(tmp_path):
    """Whether keys are given by file or digest, what Serve stores is the digest."""
    path = Path(tmp_path / "keys")
    path.write_text(KEY)
    path.chmod(0o600)
    for auth in (AUTH, {"auth": {"key_file": str(path)}}):
        told = repr(
            [deployment.init_args for deployment in deployments_of(build({"ingress": auth})).values()]
        )
        assert digest_of(KEY) in told and KEY not in told


def test_a_config_survives_json():
    """The `args` of a Serve config are JSON on their way: nothing is lost or changed by it."""
    config = parse_config(TWO_REGIONS, "test")
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json"))), "test") == config
