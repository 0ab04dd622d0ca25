"""Every alpha or private API of Ray that Searoom uses, and nothing else. Ray is pinned to 2.60.

What is private here, each with a test that fails when Ray changes it:
- `RequestRouter._choose_replica_for_request`, overridden so that a call goes to one named replica
  or raises `ReplicaGone`. Serve by itself waits for a replica, or sends the call to another.
- `DeploymentHandle._init(_run_router_in_separate_loop=...)`: the handle's router shares our event
  loop, which saves two thread hops a call.
- `handle.options(_by_reference=False)`: gRPC between replicas instead of actor calls.
- `serve.run_many`, which starts an application without waiting for it (a developer API).
- `ray.serve._private.replica.add_port_to_grpc_server`: replicas bind their gRPC port on every
  interface, whatever address the node was given. On a loopback node it is bound there too.
- `_get_global_client`: which HTTP port a Serve that is running already has.
- `handle._router._asyncio_router.request_router.curr_replicas`: Serve's running set.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application, RunTarget
from ray.serve._private import replica as serve_replica
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.errors import ReplicaGone
from serving.metrics import Series, Tags

LOOPBACK = "127.0.0.1"
GONE = (RayActorError, RayServeException, grpc.aio.AioRpcError, DeploymentUnavailableError)
PINNED_ROUTER = "serving.ray_compat:PinnedRouter"
SERVE_TAG = "replica"


class PinnedRouter(RequestRouter):
    """Sends a call to the replica its handle's session id names, or raises `ReplicaGone`."""

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        wanted = pending_request.metadata.session_id
        for replica_id, replica in dict(self._replicas).items():
            if replica_id.unique_id == wanted and not is_retry:
                return replica
        # A retry means that the replica could not be reached, or turned the call away.
        raise ReplicaGone(wanted)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]


class PinnedHandle:
    """A deployment's replicas, each called by its id. Made inside a running event loop."""

    def __init__(self, deployment: str, application: str) -> None:
        self._handle: Any = _connect(deployment, application)

    def running(self) -> frozenset[str]:
        """Ids of the replicas in Serve's running set, as this process knows it now."""
        router = self._handle._router._asyncio_router.request_router
        if router is None:
            return frozenset()
        return frozenset(replica.unique_id for replica in router.curr_replicas)

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """Call a method of that replica. Raises ReplicaGone when it is not there or dies meanwhile."""
        handle = self._handle.options(method_name=method, session_id=replica_id)
        try:
            return await handle.remote(*args)
        except GONE as error:
            raise ReplicaGone(replica_id) from error

    async def stream(self, replica_id: str, method: str, *args: Any) -> AsyncIterator[Any]:
        """Items of that replica's generator method. Raises ReplicaGone likewise."""
        handle = self._handle.options(method_name=method, session_id=replica_id, stream=True)
        response = handle.remote(*args)
        try:
            async for item in response:
                yield item
        except GONE as error:
            raise ReplicaGone(replica_id) from error
        finally:
            response.cancel()


class ServiceHandle:
    """A deployment any of whose replicas may answer: the Router, seen from Ingress and replicas."""

    def __init__(self, deployment: str, application: str) -> None:
        self._handle: Any = _connect(deployment, application)
        self._name = deployment

    async def call(self, method: str, *args: Any) -> Any:
        """Raises ReplicaGone when the one that took the call dies."""
        try:
            return await self._handle.options(method_name=method).remote(*args)
        except GONE as error:
            raise ReplicaGone(self._name) from error

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        response = self._handle.options(method_name=method, stream=True).remote(*args)
        try:
            async for item in response:
                yield item
        except GONE as error:
            raise ReplicaGone(self._name) from error
        finally:
            response.cancel()


def stay_on_loopback() -> None:
    """On a node whose address is the loopback's, bind this replica's gRPC port there only.

    Runs when this module is imported, which a replica's class does before Serve opens the port.
    """
    bind = serve_replica.add_port_to_grpc_server
    if bind.__name__ == "bind_on_node" or not ray.is_initialized():
        return
    if ray.util.get_node_ip_address() != LOOPBACK:
        return

    def bind_on_node(server: Any, address: str) -> Any:
        return bind(server, address.replace("[::]", LOOPBACK))

    serve_replica.add_port_to_grpc_server = bind_on_node


stay_on_loopback()


def start_application(application: Application, name: str, route_prefix: str) -> None:
    """Hand the application to Serve and return: what becomes of it is in `serve.status()`."""
    target = RunTarget(target=application, name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def running_http_port() -> int | None:
    """The HTTP port of the Serve instance on the cluster this process has joined; None without one."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return client.http_config.port if client is not None else None


def _connect(deployment: str, application: str) -> DeploymentHandle:
    handle = serve.get_deployment_handle(deployment, application)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=False)
    return handle.options(_by_reference=False)


def replica_id() -> str:
    """This replica's id, as `PinnedHandle` names it."""
    return serve.get_replica_context().replica_id.unique_id


def node_address() -> str:
    return ray.util.get_node_ip_address()


def application_name() -> str:
    return serve.get_replica_context().app_name


class RayMeter:
    """A `metrics.Meter` whose series are Ray's, and so on Ray's Prometheus endpoint as `ray_searoom_...`.

    Serve tags every series with the replica, and takes no tag of that name from us.
    """

    def __init__(self, series: Sequence[Series]) -> None:
        self._series: dict[str, Any] = {}
        for one in series:
            tags: Any = tuple(tag for tag in one.tags if tag != SERVE_TAG)
            if one.kind == "histogram":
                self._series[one.name] = Histogram(one.name, one.description, list(one.boundaries), tags)
            else:
                kind = Counter if one.kind == "counter" else Gauge
                self._series[one.name] = kind(one.name, one.description, tags)

    def add(self, series: Series, amount: float, tags: Tags) -> None:
        if amount:  # Ray takes no zero
            self._series[series.name].inc(amount, _ours(tags))

    def set(self, series: Series, value: float, tags: Tags) -> None:
        self._series[series.name].set(value, _ours(tags))

    def observe(self, series: Series, value: float, tags: Tags) -> None:
        self._series[series.name].observe(value, _ours(tags))


def _ours(tags: Tags) -> dict[str, str]:
    return {tag: value for tag, value in tags.items() if tag != SERVE_TAG}
