"""From token ids to text: what is asked of the Router and the replica, and how the text ends."""

import asyncio
import time
from contextlib import aclosing

import tokenizers
from tokenizers import decoders, models

from serving.auth import Caller
from serving.block_hash import hash_blocks, hash_root
from serving.completions import Completions, Reply
from serving.detokenizer import StreamDecoder, token_bytes
from serving.messages import SamplingParams
from serving.output_lengths import TABLE
from tests.serving.fleet_fakes import FakeFleet, FakeReplica, eventually
from tests.serving.routing_cases import BLOCK_TOKENS

PIECES = ["<unk>", "▁one", "▁two", "▁three", "<0xC3>", "<0xA9>"]
ONE, TWO, THREE, E_ACUTE_1, E_ACUTE_2 = range(1, 6)
PROMPT = list(range(40))


def decoder(*stop: str) -> StreamDecoder:
    backend = tokenizers.Tokenizer(models.Unigram([(piece, 0.0) for piece in PIECES], 0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return StreamDecoder(token_bytes(backend, frozenset(), "test"), stop)


def start(completions: Completions, *stop: str) -> Reply:
    return completions.start(
        "q", Caller("tenant", "key-id"), PROMPT, SamplingParams(max_tokens=1000, seed=3), decoder(*stop)
    )


async def text_of(reply: Reply) -> str:
    return "".join([piece async for piece in reply.text()])


async def test_what_leaves_an_ingress_is_all_a_router_and_a_replica_need():
    """Hashes of full blocks under the tenant's root, a deadline, the prompt; growth by the table."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        reply = start(fleet.completions(timeout_s=5.0))
        assert fleet.router.picks == []  # nothing leaves before the text is read
        answer = asyncio.create_task(text_of(reply))
        await eventually(lambda: a.running)
        (pick,), (submit,) = fleet.router.picks, a.submits
        root = hash_root("m", "weights-1", "float32", "tenant")
        assert submit.hash_root == root
        assert pick.block_hashes == tuple(hash_blocks(root, PROMPT, BLOCK_TOKENS))
        assert len(pick.block_hashes) == len(PROMPT) // BLOCK_TOKENS
        assert (pick.prompt_tokens, pick.max_tokens) == (len(PROMPT), 1000)
        assert 4.0 < pick.deadline_s - time.time() < 5.0
        assert submit.token_ids == tuple(PROMPT) and submit.sampling.seed == 3
        assert submit.reserve_blocks == -(-(len(PROMPT) + TABLE[-1]) // BLOCK_TOKENS)
        a.say("q", ONE, finish="length")
        assert await answer == " one" and reply.finish_reason == "length"
        assert (reply.prompt_tokens, reply.output_tokens) == (len(PROMPT), 1)


async def test_text_held_back_is_released_at_the_end():
    """Half a character at the end of the tokens becomes U+FFFD, and half a stop string becomes text."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        reply = start(fleet.completions(), " three!")
        answer = asyncio.create_task(text_of(reply))
        await eventually(lambda: a.running)
        a.say("q", ONE, E_ACUTE_1)
        a.say("q", E_ACUTE_2, THREE)
        a.say("q", E_ACUTE_1, finish="length")
        assert await answer == " oneé three\ufffd"


async def test_a_stop_string_ends_the_reply_and_the_request():
    """What came after it in the same step is dropped, the reason is "stop", and the replica is told."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        reply = start(fleet.completions(), " two")
        answer = asyncio.create_task(text_of(reply))
        await eventually(lambda: a.running)
        a.say("q", ONE, TWO, THREE)
        assert await answer == " one" and reply.finish_reason == "stop"
        await eventually(lambda: a.aborts == ["q"] and fleet.num_held == 0)


async def test_closed_early_the_reason_is_abort():
    """Nobody read the rest, and the replica does not compute it."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        reply = start(fleet.completions())
        async with aclosing(reply.text()) as pieces:
            first = asyncio.ensure_future(anext(pieces))
            await eventually(lambda: a.running)
            a.say("q", ONE)
            assert await first == " one"
        assert reply.finish_reason == "abort"
        await eventually(lambda: a.aborts == ["q"])
