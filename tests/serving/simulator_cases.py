"""Small clusters, loads and policies that tests of the simulator start from."""

import hashlib
import random

import numpy as np

from cluster.load import StepCoefficients
from serving.dispatcher import Dispatcher, DispatcherLimits
from serving.messages import Overloaded, Queued, Route
from serving.simulator import SimReplica, SimRequest, SimSetup, simulate

BLOCK_TOKENS = 16
STEP = StepCoefficients(base_ms=5.0, per_token_ms=0.1, per_kv_token_ms=0.001, per_pair_ms=1e-5)


def a_replica(name="r0", **changes):
    fields = {
        "region": "us", "num_blocks": 256, "step": STEP, "max_step_tokens": 256, "max_num_seqs": 16,
    }  # fmt: skip
    return SimReplica(name=name, **{**fields, **changes})


def prompt_hashes(name, prompt_tokens, block_tokens=BLOCK_TOKENS):
    """Chained names of the full blocks; prompts of one name share their prefix."""
    hashes, parent = [], str(name).encode()
    for _ in range(prompt_tokens // block_tokens):
        parent = hashlib.blake2b(parent, digest_size=16).digest()
        hashes.append(parent)
    return tuple(hashes)


def a_request(number=0, arrival_s=0.0, prompt_tokens=100, output_tokens=20, prefix=None, **changes):
    hashes = prompt_hashes(number if prefix is None else f"prefix {prefix}", prompt_tokens)
    fields = {"region": "us", "tenant": "t", "priority": 0, "max_tokens": 1000, "block_hashes": hashes}
    return SimRequest(
        number=number,
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        **{**fields, **changes},
    )


def a_load(num_requests, rate, seed=0, **changes):
    """Poisson arrivals of chats about one of four long beginnings."""
    chance, arrival_s, requests = random.Random(seed), 0.0, []
    for number in range(num_requests):
        arrival_s += chance.expovariate(rate)
        requests.append(
            a_request(
                number,
                arrival_s,
                prompt_tokens=chance.randint(20, 600),
                output_tokens=chance.randint(1, 200),
                prefix=chance.choice([None, 0, 1, 2, 3]),
                priority=chance.choice([0, 0, 1]),
                **changes,
            )
        )
    return requests


class Scripted:
    """Routes as `choose(request, members)` says: a name, "queue" or "overloaded"; logs what it is told."""

    def __init__(self, choose, reserve_blocks=0):
        self._choose = choose
        self._reserve_blocks = reserve_blocks
        self.members = []
        self.requests, self.updates, self.loads, self.news, self.memberships = [], [], [], [], []
        self.held = {}  # queued requests
        self.knows_blocks = True

    def request(self, request, now):
        self.requests.append((now, request))
        if request.deadline_s <= now:
            self.held.pop(request.request_id, None)
            return Overloaded(request_id=request.request_id, retry_after_s=1.0, why="late")
        answer = self._reply(request)
        if isinstance(answer, Queued):
            self.held[request.request_id] = request
        return answer

    def update(self, update, now):
        self.updates.append((now, update))
        return self._advance()

    def replica_reported(self, load, now):
        self.loads.append((now, load))
        return self._advance()

    def replica_events(self, replica_id, epoch, news, now):
        self.news.append((now, replica_id, news))
        return self.knows_blocks

    def membership(self, ids, now):
        self.members = sorted(ids)
        self.memberships.append((now, sorted(ids)))
        return self._advance()

    def tick(self, now):
        return self._advance()

    def _advance(self):
        answers = []
        for request in list(self.held.values()):
            reply = self._reply(request)
            if not isinstance(reply, Queued):
                del self.held[request.request_id]
                answers.append((request.ingress_id, reply))
        return answers

    def _reply(self, request):
        chosen = self._choose(request, self.members)
        if chosen == "queue":
            return Queued(request_id=request.request_id, position=1, predicted_wait_ms=0.0)
        if chosen == "overloaded":
            return Overloaded(request_id=request.request_id, retry_after_s=1.0, why="no")
        return Route(
            request_id=request.request_id,
            replica_id=chosen,
            region="us",
            reserve_blocks=self._reserve_blocks,
            matched_blocks=0,
            predicted_ms=0.0,
            why="scripted",
        )


def in_turn(request, members):
    """Round robin by number, past whoever refused."""
    names = [name for name in members if name not in request.refused_replicas]
    return names[int(request.request_id) % len(names)] if names else "overloaded"


TWO = SimSetup(replicas=(a_replica("r0"), a_replica("r1")), block_tokens=BLOCK_TOKENS)


def production(number, setup):
    return Dispatcher(
        DispatcherLimits(), {spec.region: 0.5 for spec in setup.replicas}, block_tokens=setup.block_tokens
    )


def arrays(result):
    return {name: value for name, value in vars(result).items() if isinstance(value, np.ndarray)}


def digest(result):
    return {name: value.tobytes() for name, value in arrays(result).items()}


def run_scripted(setup, requests, choose=in_turn, **script):
    policies = []

    def make(number, setup):
        policies.append(Scripted(choose, **script))
        return policies[-1]

    return simulate(setup, requests, make), policies
