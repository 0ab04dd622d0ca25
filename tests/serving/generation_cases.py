"""Generations that tests start from, and replicas that answer them."""

from serving.auth import Caller
from serving.completions import Completions, Reply
from serving.detokenizer import StreamDecoder, TokenBytes
from serving.generation import Generation
from serving.messages import SamplingParams, SequenceDelta, Submit
from tests.serving.fleet_fakes import FakeReplica

NO_SPELLING = TokenBytes((), strips_first_space=False)


def reply_of(
    completions: Completions, request_id: str = "q", prompt_tokens: int = 160, max_tokens: int = 64
) -> Reply:
    """A reply whose request wants (160 + 64) / 16 = 14 blocks."""
    caller = Caller(tenant_key="a-tenant", key_id="k")
    sampling = SamplingParams(max_tokens=max_tokens)
    return completions.start(request_id, caller, [1] * prompt_tokens, sampling, StreamDecoder(NO_SPELLING))


def generation_of(completions: Completions, request_id: str = "q", **sizes: int) -> Generation:
    return reply_of(completions, request_id, **sizes).generation


async def tokens_of(generation: Generation) -> list[int]:
    return [token async for delta in generation.run() for token in delta.token_ids]


def say_three(submit: Submit) -> list[SequenceDelta]:
    request_id = submit.request_id
    return [
        SequenceDelta(request_id=request_id, token_ids=(7,)),
        SequenceDelta(request_id=request_id, token_ids=(8, 9), finish_reason="length"),
    ]


def a_replica(name: str, **options: int) -> FakeReplica:
    replica = FakeReplica(name, **options)
    replica.script = say_three
    return replica
