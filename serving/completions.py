"""From a prompt's token ids to text as it is generated: what lies between the HTTP routes and a replica.

Knows tokens, tenants and text; nothing of HTTP, Serve or blocks in GPUs.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from serving.auth import Caller
from serving.block_hash import hash_blocks, hash_root
from serving.detokenizer import StreamDecoder
from serving.generation import Generation
from serving.links import ReplicaLinks
from serving.messages import FinishReason, RouteRequest, SamplingParams, Submit
from serving.router_link import RouterLink


@dataclass(frozen=True)
class ModelIdentity:
    """What a block's hash must agree on between Ingress and engine, besides the tokens."""

    name: str
    weight_version: str
    kv_dtype: str
    block_tokens: int


class Reply:
    """One reply under way. `text` yields it; the other properties tell how it went."""

    def __init__(self, generation: Generation, decoder: StreamDecoder, started_s: float) -> None:
        self.generation = generation
        self._decoder = decoder
        self.started_s = started_s

    @property
    def request_id(self) -> str:
        return self.generation.request.request_id

    @property
    def prompt_tokens(self) -> int:
        return self.generation.request.prompt_tokens

    @property
    def output_tokens(self) -> int:
        return self.generation.output_tokens

    @property
    def cached_tokens(self) -> int:
        times = self.generation.times.sequence
        return times.cached_tokens if times is not None else 0

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended: a stop string is seen here, everything else in the engine."""
        if self._decoder.stopped:
            return "stop"
        return self.generation.finish_reason or "abort"

    @property
    def is_decided(self) -> bool:
        """Why it ends is known: what is still to come of it comes without waiting."""
        return self._decoder.stopped or self.generation.finish_reason is not None

    async def text(self) -> AsyncGenerator[str]:
        """Pieces of text, possibly empty, one a step. Closing it early aborts the request."""
        async with aclosing(self.generation.run()) as deltas:
            async for delta in deltas:
                yield self._decoder.push(delta.token_ids)
                if self._decoder.stopped:
                    return
        if rest := self._decoder.finish():
            yield rest


class Completions:
    """Starts replies. One for an Ingress replica."""

    def __init__(
        self,
        identity: ModelIdentity,
        router: RouterLink,
        links: ReplicaLinks,
        *,
        ingress_id: str,
        timeout_s: float,
    ) -> None:
        self._identity = identity
        self._router = router
        self._links = links
        self._ingress_id = ingress_id
        self._timeout_s = timeout_s

    def start(
        self,
        request_id: str,
        caller: Caller,
        token_ids: list[int],
        sampling: SamplingParams,
        decoder: StreamDecoder,
        traceparent: str | None = None,
    ) -> Reply:
        """A reply to this prompt. Nothing leaves before its `text` is read."""
        now = time.time()
        identity = self._identity
        root = hash_root(identity.name, identity.weight_version, identity.kv_dtype, caller.tenant_key)
        request = RouteRequest(
            request_id=request_id,
            ingress_id=self._ingress_id,
            model=identity.name,
            tenant_key=caller.tenant_key,
            deadline_s=now + self._timeout_s,
            prompt_tokens=len(token_ids),
            max_tokens=sampling.max_tokens,
            block_hashes=hash_blocks(root, token_ids, identity.block_tokens),
        )
        submit = Submit(
            request_id=request_id,
            token_ids=tuple(token_ids),
            sampling=sampling,
            reserve_blocks=0,  # the Route says how many
            hash_root=root,
            traceparent=traceparent,
        )
        return Reply(Generation(request, submit, self._router, self._links), decoder, now)
