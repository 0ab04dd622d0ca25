"""The composition root: a config becomes a Serve application of three kinds of deployment.

build(args) -> Application        for `serve deploy`, `python -m serving deploy` and `searoom up`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.nccl import nccl_environment
from cluster.placement import REGION_LABEL, REPLICA_CPUS, GroupPlacement, plan_group
from cluster.regions import ClusterFileError, ClusterMap, pretend, read_cluster_file
from serving.auth import key_digests
from serving.config import RegionConfig, SearoomConfig, parse_config
from serving.errors import ConfigError
from serving.ingress import Ingress, IngressSetup
from serving.model_files import ModelFiles, resolve
from serving.model_spec import ModelSpec, read_model_spec
from serving.rank_group import ReplicaSetup
from serving.ray_compat import PINNED_ROUTER
from serving.replica import ModelReplica
from serving.router import Router, RouterSetup

ANSWER_BYTES = 64 << 10  # an answer of some hundred tokens, as frames between regions
MAX_ONGOING_CALLS = 10_000  # Serve's default of 5 would queue calls unseen; admission is by KV blocks
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 30.0
ROUTER_DRAIN_S = 2.0  # its streams never end by themselves; who asked the old one asks the new one
# Waiting OpenMP threads spin for some microseconds, then sleep: a rank shares its cores with Ingress
# and Ray. Sleeping at once halved a step's speed on 2 cores, spinning on starved the others.
CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
# Their code shares Ray's event loop, which is uvloop: nothing in them blocks it, and a thread of its own
# costs two hops a call.
CONTROL_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
# A line a call would be a line a load report; requests are logged once, by Ingress.
NO_ACCESS_LOG = {"enable_access_log": False}


@dataclass(frozen=True)
class Plan:
    """A checked config: everything that can be known to be impossible has been said."""

    config: SearoomConfig
    files: ModelFiles
    spec: ModelSpec
    cluster: ClusterMap

    @property
    def model_name(self) -> str:
        return self.config.model.name or self.files.name

    def deployment_name(self, region: str) -> str:
        return f"ModelReplica-{self.model_name.replace('/', '--')}-{region}"


def build(args: dict[str, Any]) -> Application:
    """The application `args` describes. Raises ConfigError or ModelFileError before anything starts."""
    return compose(make_plan(parse_config(args, "args")))


def make_plan(config: SearoomConfig) -> Plan:
    """Check what can be checked without a cluster: the model's files, its split, the regions."""
    files = resolve(config.model.source)
    spec = read_model_spec(files.folder)
    sizes = spec.tensor_parallel_sizes()
    if config.engine.tensor_parallel not in sizes:
        raise ConfigError(
            f"engine.tensor_parallel: {config.engine.tensor_parallel} ranks cannot share "
            f"{spec.num_heads} query and {spec.num_kv_heads} KV heads; this model splits over "
            f"{' or '.join(map(str, sizes))}"
        )
    return Plan(config, files, spec, _cluster_map(config))


def compose(plan: Plan) -> Application:
    """Bind the three kinds of deployment together."""
    config = plan.config
    names = [region.name for region in config.regions]
    rtt_ms = {name: plan.cluster.rtt_ms(config.home, name) for name in names}
    pretend_ms = rtt_ms if config.routing.pretend_rtt else dict.fromkeys(names, 0.0)
    deployments = {name: plan.deployment_name(name) for name in names}
    replicas = [_model_replica(plan, region, pretend_ms[region.name]) for region in config.regions]
    router_setup = RouterSetup(
        routing=config.routing,
        block_tokens=config.engine.block_tokens,
        region=config.home,
        deployments=tuple(deployments.values()),
        rtt_ms=rtt_ms,
        egress_ms={
            name: plan.cluster.egress_ms(config.home, name, ANSWER_BYTES, config.engine.tensor_parallel)
            for name in names
        },
        log_level=config.log_level,
    )
    router = _control_deployment(Router, "Router", config, num_replicas=1, drain_s=ROUTER_DRAIN_S).bind(
        router_setup
    )
    setup = IngressSetup(
        model=config.model.model_copy(update={"dtype": config.dtype}),
        model_name=plan.model_name,
        kv_identity=config.kv_identity,
        block_tokens=config.engine.block_tokens,
        limits=config.ingress,
        tracing=config.tracing,
        region=config.home,
        deployments=deployments,
        pretend_rtt_ms=pretend_ms,
        key_sha256=key_digests(config.ingress.auth),
        log_level=config.log_level,
    )
    gateway = serve.ingress()(Ingress)
    ingress = _control_deployment(
        gateway, "Ingress", config, num_replicas=config.ingress.replicas, drain_s=_drain_s(config)
    )
    return ingress.bind(setup, router, *replicas)


def _control_deployment(
    cls: Any, name: str, config: SearoomConfig, *, num_replicas: int, drain_s: float
) -> Any:
    actor_options: dict[str, Any] = {
        "num_cpus": REPLICA_CPUS,
        "runtime_env": {"env_vars": CONTROL_ENVIRONMENT},
    }
    if config.pin_regions:
        actor_options["label_selector"] = {REGION_LABEL: config.home}
    deployment: Any = serve.deployment(cls)
    return deployment.options(
        name=name,
        num_replicas=num_replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=MAX_ONGOING_CALLS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s,
        logging_config=NO_ACCESS_LOG,
    )


def _model_replica(plan: Plan, region: RegionConfig, pretend_ms: float) -> Application:
    config = plan.config
    placement = _placement(config, region.name)
    environment = CPU_ENVIRONMENT if config.engine.device == "cpu" else _fabric(plan, region.name)
    options: dict[str, Any] = {
        "placement_group_bundles": placement.bundles,
        "placement_group_strategy": placement.strategy,
    }
    if placement.label_selector:
        options["placement_group_bundle_label_selector"] = [placement.label_selector] * len(placement.bundles)
    replica: Any = serve.deployment(ModelReplica)
    deployment = replica.options(
        name=plan.deployment_name(region.name),
        num_replicas=region.replicas,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        max_ongoing_requests=MAX_ONGOING_CALLS,
        request_router_config=RequestRouterConfig(request_router_class=PINNED_ROUTER),  # type: ignore[arg-type]
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=_drain_s(config),
        logging_config=NO_ACCESS_LOG,
        **options,
    )
    setup = ReplicaSetup(
        model=config.model.model_copy(update={"dtype": config.dtype}),
        engine=config.engine,
        region=region.name,
        pretend_rtt_ms=pretend_ms,
        environment=environment,
        log_level=config.log_level,
    )
    return deployment.bind(setup)


def _placement(config: SearoomConfig, region: str) -> GroupPlacement:
    return plan_group(
        tp=config.engine.tensor_parallel,
        device=config.engine.device,
        ranks_per_node=config.engine.ranks_per_node,
        region=region if config.pin_regions else None,
        accelerator=config.engine.accelerator,
    )


def _fabric(plan: Plan, region: str) -> dict[str, str]:
    return nccl_environment(plan.cluster.fabric(region))


def _drain_s(config: SearoomConfig) -> float:
    """Longer than the longest stream, so that a replica that leaves finishes what it has."""
    return config.ingress.request_timeout_s + 30.0


def _cluster_map(config: SearoomConfig) -> ClusterMap:
    names = [region.name for region in config.regions]
    try:
        cluster = config.cluster_map
        if config.cluster_file is not None:
            cluster = read_cluster_file(Path(config.cluster_file))
    except ClusterFileError as error:
        raise ConfigError(str(error)) from error
    if cluster is None:
        return pretend(names)
    unknown = sorted(set(names) - {region.name for region in cluster.regions})
    if unknown:
        raise ConfigError(f"regions: {', '.join(unknown)} not in the cluster file; add or remove them")
    return cluster
