"""Loads, views and requests that tests of the routing policy start from."""

import msgspec

from cluster.load import StepCoefficients
from serving.messages import RouteRequest
from tests.cluster.load_cases import a_load as a_load

BLOCK_TOKENS = 16
PER_TOKEN_ONLY = StepCoefficients(0.0, 0.1, 0.0)


def a_request(prompt_tokens: int = 160, **changes: object) -> RouteRequest:
    request = RouteRequest(
        request_id="q",
        ingress_id="ingress",
        model="m",
        tenant_key="t",
        deadline_s=1e9,
        prompt_tokens=prompt_tokens,
        max_tokens=64,
    )
    return msgspec.structs.replace(request, **changes)
