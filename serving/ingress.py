"""Ingress: the deployment at the door. It knows text and tenants, not blocks in GPUs.

This room only puts the parts together; the way of one request is in `gateway` (HTTP),
`completions` (tokens and text) and `generation` (pick, submit, follow, settle).
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from serving import metrics
from serving.auth import KeyRing
from serving.background import collect_rarely
from serving.completions import Completions, ModelIdentity
from serving.config import IngressConfig, ModelConfig, TracingConfig
from serving.direct_calls import DirectReplicas, DirectService, ray_tls
from serving.dispatcher import RouterStatus
from serving.errors import ReplicaGone, ServerOverloaded
from serving.gateway import Gateway, GatewayLimits
from serving.http_server import HttpServer
from serving.links import ReplicaLinks
from serving.logs import configure as configure_logs
from serving.messages import DispatchUpdate, decode
from serving.model_files import resolve
from serving.model_spec import read_model_spec
from serving.ray_compat import PinnedHandle, RayMeter, ServiceHandle, application_name, replica_id
from serving.request_log import RequestLog
from serving.router_link import RouterLink
from serving.tokenizer import Tokenizer
from serving.tracing import make_tracer
from serving.transport import DelayLine


class IngressSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What `app.compose` works out for Ingress."""

    model: ModelConfig
    model_name: str  # the id clients use
    kv_identity: str  # `SearoomConfig.kv_identity`
    block_tokens: int
    limits: IngressConfig
    tracing: TracingConfig
    region: str  # where Ingress stands
    deployments: dict[str, str]  # region → ModelReplica deployment
    pretend_rtt_ms: dict[str, float]
    key_sha256: tuple[str, ...]
    log_level: str


class Ingress:
    """Made by Serve in the home region. Serve asks it for its ASGI application once it stands."""

    _http: HttpServer | None = None  # where it answers HTTP itself

    async def __init__(self, setup: IngressSetup, *deployments: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """`deployments` binds the others to this one's application; they are reached by name."""
        ingress_id = replica_id()
        application = application_name()
        configure_logs(setup.log_level, replica=ingress_id, region=setup.region)
        files = await asyncio.to_thread(resolve, setup.model.source)
        spec = read_model_spec(files.folder)
        tls = ray_tls()
        self._router = DirectService(ServiceHandle("Router", application), "Router", tls)
        self._router_link = RouterLink(self._router, ingress_id)
        self._links = ReplicaLinks(
            {
                region: (
                    DirectReplicas(PinnedHandle(deployment, application), tls),
                    DelayLine(setup.pretend_rtt_ms[region]),
                )
                for region, deployment in setup.deployments.items()
            },
            ingress_id,
            on_lost=self._tell_lost,
        )
        identity = ModelIdentity(
            name=setup.model_name,
            weight_version=files.weight_version,
            kv_dtype=setup.kv_identity,
            block_tokens=setup.block_tokens,
        )
        completions = Completions(
            identity,
            self._router_link,
            self._links,
            ingress_id=ingress_id,
            timeout_s=setup.limits.request_timeout_s,
        )
        tracing = setup.tracing
        tracer = make_tracer(tracing.exporter, tracing.endpoint, tracing.sample_ratio, "searoom-ingress")
        self._gateway = Gateway(
            setup.model_name,
            Tokenizer(files),
            spec,
            KeyRing(setup.key_sha256),
            completions,
            GatewayLimits(setup.limits.max_body_bytes, spec.context_tokens),
            RequestLog(setup.model_name, RayMeter(metrics.INGRESS_SERIES), tracer),
            is_ready=lambda: self._links.any_attached and self._router_link.is_attached,
            fleet_status=self._fleet_status,
        )
        collect_rarely()
        if setup.limits.port is not None:
            self._http = HttpServer(self._gateway)
            await self._http.start(setup.limits.host, setup.limits.port)

    async def __del__(self) -> None:
        """Serve awaits it before it ends the process; of requests past its proxy it knows nothing."""
        if self._http is not None:
            await self._http.drain()

    def __serve_build_asgi_app__(self) -> Gateway:
        return self._gateway

    async def check_health(self) -> None:
        self._links.background.check()
        self._router_link.background.check()

    def _tell_lost(self, replica_id: str) -> None:
        """The stream to a replica broke: the Router learns of it before Serve does."""
        self._router_link.tell(DispatchUpdate(request_id="", replica_id=replica_id, outcome="lost"))

    async def _fleet_status(self) -> bytes:
        try:
            status = await asyncio.wait_for(self._router.call("status"), 5.0)
        except (TimeoutError, ReplicaGone) as late:
            raise ServerOverloaded("the Router does not answer", retry_after_s=1.0) from late
        return msgspec.json.encode(decode(status, RouterStatus))
