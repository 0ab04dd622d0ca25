"""The Router's state machine beside real reservations, with news delayed and reordered at will.

Hypothesis plays Ingress, replicas, Serve and the network; the laws are checked after every event.
"""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from routing_cases import BLOCK_TOKENS, a_load, a_request

from cluster.load import ReplicaLoad
from serving.dispatcher import Answers, Dispatcher, DispatcherLimits
from serving.messages import DispatchUpdate, Queued, Route, RouteReply, RouteRequest

LIMITS = DispatcherLimits(max_waiting_requests=8, max_wait_s=20.0)
REGIONS = ("us-east", "eu-west")


class Replica:
    """An engine's bookkeeping: it reserves atomically, numbers what it accepts, or refuses."""

    def __init__(self, replica_id: str, region: str) -> None:
        self.replica_id, self.region = replica_id, region
        self.reserved: dict[str, int] = {}
        self.submissions = self.sequence = 0

    def submit(self, request_id: str, blocks: int) -> int | None:
        if sum(self.reserved.values()) + blocks > 100:
            return None
        self.reserved[request_id] = blocks
        self.submissions += 1
        return self.submissions

    def report(self) -> ReplicaLoad:
        self.sequence += 1
        return a_load(
            self.replica_id,
            region=self.region,
            sequence=self.sequence,
            last_submission=self.submissions,
            blocks_reserved=sum(self.reserved.values()),
            num_running=len(self.reserved),
        )


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.router = Dispatcher(LIMITS, {"us-east": 0.0, "eu-west": 75.0}, block_tokens=BLOCK_TOKENS)
        self.now = 1_000.0
        self.replicas: dict[str, Replica] = {}
        self.heard_of: dict[str, int] = {}  # newest report the router was given, by replica
        self.reports: list[ReplicaLoad] = []  # on their way
        self.updates: list[DispatchUpdate] = []  # on their way
        self.requests: dict[str, RouteRequest] = {}
        self.arrival: dict[str, int] = {}
        self.waiting: set[str] = set()  # asked, Queued, and not answered yet
        self.routes: dict[str, tuple[Route, float]] = {}  # routed and not submitted, and since when
        self.refused_at: dict[str, dict[str, int]] = {}
        self.num_made = 0

    # What the world does.

    @precondition(lambda self: len(self.replicas) < 4)
    @rule(region=st.sampled_from(REGIONS), reports_first=st.booleans())
    def replica_starts(self, region: str, reports_first: bool) -> None:
        self.num_made += 1
        replica = Replica(f"r{self.num_made}", region)
        self.replicas[replica.replica_id] = replica
        if reports_first:
            self._report(replica.report())
        self._take(self.router.membership(set(self.replicas), self.now))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def replica_dies(self, data: st.DataObject) -> None:
        del self.replicas[data.draw(st.sampled_from(sorted(self.replicas)))]
        self._take(self.router.membership(set(self.replicas), self.now))

    @rule(
        prompt_tokens=st.integers(1, 1700),
        priority=st.integers(0, 1),
        regions=st.sampled_from([(), ("us-east",), REGIONS]),
        ingress_id=st.sampled_from(["one", "two"]),
        patience_s=st.sampled_from([1.0, 100.0]),
    )
    def client_asks(
        self, prompt_tokens: int, priority: int, regions: tuple[str, ...], ingress_id: str, patience_s: float
    ) -> None:
        self.num_made += 1
        name = f"q{self.num_made}"
        self.arrival[name] = self.num_made
        self.requests[name] = a_request(
            prompt_tokens,
            request_id=name,
            priority=priority,
            allowed_regions=regions,
            ingress_id=ingress_id,
            deadline_s=self.now + patience_s,
        )
        self._ask(name)

    @precondition(lambda self: self.routes)
    @rule(data=st.data())
    def ingress_submits(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.routes)))
        route, since_s = self.routes.pop(name)
        replica = self.replicas.get(route.replica_id)
        submission = replica.submit(name, route.reserve_blocks) if replica is not None else None
        if submission is not None:
            self._send(name, route.replica_id, "accepted", submission)
        elif self.now - since_s < LIMITS.dispatch_ttl_s:
            self.refused_at.setdefault(name, {})[route.replica_id] = self.heard_of[route.replica_id]
            self._send(name, route.replica_id, "refused" if replica is not None else "lost")
            refused = tuple(self.refused_at[name])
            self.requests[name] = msgspec.structs.replace(self.requests[name], refused_replicas=refused)
            for refuser in refused:
                self.refused_at[name][refuser] = self.heard_of[refuser]
            self._ask(name)

    @precondition(lambda self: any(replica.reserved for replica in self.replicas.values()))
    @rule(data=st.data())
    def stream_ends(self, data: st.DataObject) -> None:
        running = [(r.replica_id, name) for r in self.replicas.values() for name in r.reserved]
        replica_id, name = data.draw(st.sampled_from(sorted(running)))
        del self.replicas[replica_id].reserved[name]
        self._send(name, replica_id, "finished")

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def replica_writes_a_report(self, data: st.DataObject) -> None:
        self.reports.append(self.replicas[data.draw(st.sampled_from(sorted(self.replicas)))].report())

    @precondition(lambda self: self.reports)
    @rule(data=st.data())
    def a_report_arrives(self, data: st.DataObject) -> None:
        self._report(self.reports.pop(data.draw(st.integers(0, len(self.reports) - 1))))

    @precondition(lambda self: self.updates)
    @rule(data=st.data())
    def an_update_arrives(self, data: st.DataObject) -> None:
        update = self.updates.pop(data.draw(st.integers(0, len(self.updates) - 1)))
        self._take(self.router.update(update, self.now))

    @rule(ingress_id=st.sampled_from(["one", "two"]))
    def ingress_dies(self, ingress_id: str) -> None:
        gone = {name for name, request in self.requests.items() if request.ingress_id == ingress_id}
        self.waiting -= gone
        self.routes = {name: route for name, route in self.routes.items() if name not in gone}
        self._take(self.router.ingress_gone(ingress_id, self.now))

    @rule(seconds=st.sampled_from([0.05, 0.9, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._take(self.router.tick(self.now))

    # The laws.

    @invariant()
    def books_agree(self) -> None:
        self.router.check_integrity()
        assert self.router.num_waiting == len(self.waiting)

    def teardown(self) -> None:
        """When everybody has gone quiet, every request has its answer and no block stays dispatched."""
        for _ in range(5):
            self.now += LIMITS.max_wait_s / 4
            for replica in self.replicas.values():
                self._report(replica.report())
            self._take(self.router.tick(self.now))
        self.now += LIMITS.max_wait_s
        self._take(self.router.tick(self.now))
        assert not self.waiting
        self.now += LIMITS.dispatch_ttl_s
        self._take(self.router.tick(self.now))
        assert all(status.dispatched_blocks == 0 for status in self.router.status(self.now).replicas)
        self.books_agree()

    def _ask(self, name: str) -> None:
        assert name not in self.waiting
        self.waiting.add(name)
        reply = self.router.request(self.requests[name], self.now)
        assert reply.request_id == name
        if not isinstance(reply, Queued):
            self._answer(reply)

    def _take(self, answers: Answers) -> None:
        for ingress_id, reply in answers:
            assert not isinstance(reply, Queued)
            assert self.requests[reply.request_id].ingress_id == ingress_id
            self._answer(reply)

    def _answer(self, reply: RouteReply) -> None:
        """One final answer an ask, a Route only to a fit replica, and to none an earlier request wants."""
        name = reply.request_id
        assert name in self.waiting
        self.waiting.remove(name)
        if not isinstance(reply, Route):
            return
        request = self.requests[name]
        replica = self.replicas[reply.replica_id]
        assert self.now < request.deadline_s
        assert self._wants(request, replica)
        assert self.refused_at.get(name, {}).get(reply.replica_id, 0) < self.heard_of[reply.replica_id]
        for other in self.waiting:
            if self._place(other) < self._place(name):
                assert not self._wants(self.requests[other], replica)
        self.routes[name] = (reply, self.now)

    def _wants(self, request: RouteRequest, replica: Replica) -> bool:
        return not request.allowed_regions or replica.region in request.allowed_regions

    def _place(self, name: str) -> tuple[int, int]:
        return (self.requests[name].priority, self.arrival[name])

    def _send(self, name: str, replica_id: str, outcome: str, submission: int = 0) -> None:
        self.updates.append(
            DispatchUpdate(request_id=name, replica_id=replica_id, outcome=outcome, submission=submission)  # type: ignore[arg-type]
        )

    def _report(self, load: ReplicaLoad) -> None:
        newest = max(self.heard_of.get(load.replica_id, 0), load.sequence)
        self.heard_of[load.replica_id] = newest
        self._take(self.router.replica_reported(load, self.now))


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
