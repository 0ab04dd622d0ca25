"""The peers' routers by name, ready for the simulator.

    rule (baseline_scores, baseline_affinity, baseline_regions) ──BaselinePolicy──► simulator.Policy

Each is implemented from what its project publishes, with that project's default settings; where the
rule was read stands at each of them. `check_baselines` compares three of them with the real gateways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serving.bench.router.baseline_affinity import (
    RayPrefix,
    SglangCacheAware,
    SglangSmallestTree,
    Smg,
    VllmRouter,
)
from serving.bench.router.baseline_policy import BaselinePolicy
from serving.bench.router.baseline_regions import SkyWalker
from serving.bench.router.baseline_scores import Dynamo, LeastKv, LlmD, LMetric, PowerOfTwo, RoundRobin
from serving.bench.router.baseline_views import Rule
from serving.simulator import MakePolicy, Policy, SimSetup

MakeRule = Callable[[str, int], Rule]
"""The rule of a router in this region, with this seed."""

_RULES: Mapping[str, MakeRule] = {
    "round robin": lambda home, seed: RoundRobin(),
    "power of two": lambda home, seed: PowerOfTwo(seed),
    "least KV": lambda home, seed: LeastKv(),
    "ray prefix": lambda home, seed: RayPrefix(seed),
    "sglang": lambda home, seed: SglangCacheAware(),
    "sglang smallest tree": lambda home, seed: SglangSmallestTree(),
    "smg": lambda home, seed: Smg(),
    "vllm-router": lambda home, seed: VllmRouter(),
    "llm-d": lambda home, seed: LlmD(),
    "dynamo": lambda home, seed: Dynamo(),
    "lmetric": lambda home, seed: LMetric(),
    "skywalker": lambda home, seed: SkyWalker(home),
}


def _maker(make_rule: MakeRule) -> MakePolicy:
    def make(router: int, setup: SimSetup) -> Policy:
        regions = setup.router_regions
        home = regions[router] if regions else setup.replicas[0].region
        seed = setup.seed * 1_000 + router
        return BaselinePolicy(
            make_rule(home, seed),
            {replica.name: replica.region for replica in setup.replicas},
            block_tokens=setup.block_tokens,
            seed=seed,
        )

    return make


BASELINES: Mapping[str, MakePolicy] = {name: _maker(make_rule) for name, make_rule in _RULES.items()}
"""What to give `simulate` as `make_policy`, by the peer's name."""
