"""Whatever fails, whenever: it costs the request it befell, and nobody else anything."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from serving.engine.sequence import SequenceState
from serving.messages import BlockRemoved, Refused
from tests.serving.engine.harness import Harness, expected_outputs, request

PREFIX = tuple(range(50, 62))  # three blocks of four


def mixed_requests():
    """Long and short, sharing a prefix and not, with and without reservations, of two classes."""
    return [
        request("long", tuple(range(24)), max_tokens=6, priority=1),
        request("shared1", (*PREFIX, 1, 2), max_tokens=14, reserve_blocks=7),
        request("shared2", (*PREFIX, 3), max_tokens=11),
        request("grows", (7,), max_tokens=26),
        request("urgent", (8, 9, 10, 11, 12), max_tokens=9, priority=-1, reserve_blocks=2),
        request("last", (*PREFIX, 1, 2), max_tokens=3, priority=1),
    ]


@pytest.mark.parametrize("foresees", [False, True], ids=["blind", "foreseeing"])
@pytest.mark.parametrize("num_blocks", range(7, 40))
def test_out_of_blocks_at_every_point(num_blocks, foresees):
    """From the least pool that holds the longest prompt to one that holds everything, all is as alone."""
    harness = Harness(num_blocks, max_num_seqs=5, max_step_tokens=11, foresees=foresees)
    for submit in mixed_requests():
        while isinstance(harness.submit(submit), Refused):
            assert harness.step(), "refused by an idle scheduler"
    harness.run()
    harness.check_outputs()
    assert len(harness.ends) == 6


@dataclass(frozen=True)
class Moment:
    """A state in which request "a" is aborted: whether it has been reached, and whether in mid-step."""

    reached: Callable[[Harness], bool]
    in_flight: bool = False


def sequence_a(harness):
    return harness.sequences["a"]


def is_half_prefilled(harness):
    a = sequence_a(harness)
    return a.state is SequenceState.RUNNING and 0 < a.num_computed < a.prompt_tokens - 1


def is_decoding(harness):
    return sequence_a(harness).state is SequenceState.RUNNING and sequence_a(harness).num_outputs > 1


MOMENTS = {
    "waiting": Moment(lambda h: sequence_a(h).state is SequenceState.WAITING),
    "waiting with a pinned prefix": Moment(
        lambda h: sequence_a(h).state is SequenceState.WAITING and len(sequence_a(h).block_table) > 0
    ),
    "waiting while others compute": Moment(
        lambda h: sequence_a(h).state is SequenceState.WAITING and len(h.steps) > 1, in_flight=True
    ),
    "half prefilled": Moment(is_half_prefilled),
    "half prefilled, in flight": Moment(is_half_prefilled, in_flight=True),
    "decoding": Moment(is_decoding),
    "decoding, in flight": Moment(is_decoding, in_flight=True),
    "preempted": Moment(
        lambda h: sequence_a(h).state is SequenceState.WAITING and sequence_a(h).num_preemptions > 0
    ),
    "computing again": Moment(
        lambda h: sequence_a(h).state is SequenceState.RUNNING and sequence_a(h).is_protected
    ),
    "just finished": Moment(lambda h: "a" in h.ends),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_an_abort_in_every_state(moment):
    """It ends once, as aborted or as it had ended already; its blocks come back; the others are as alone."""
    harness = Harness(num_blocks=13, max_num_seqs=3, max_step_tokens=6)
    harness.submit(request("before", (*PREFIX, 1), max_tokens=1))
    harness.run()  # leaves a prefix behind
    harness.submit(request("b", tuple(range(20, 28)), max_tokens=18, priority=-1))
    harness.submit(request("a", (*PREFIX, 2, 3, *range(30, 42)), max_tokens=12))
    harness.submit(request("c", tuple(range(70, 77)), max_tokens=18, priority=-1))
    for _ in range(200):
        if moment.reached(harness):
            break
        assert harness.step(), "never reached"
    if moment.in_flight:
        harness.begin()
    had_ended = "a" in harness.ends
    assert harness.abort("a") is not had_ended
    assert not harness.abort("a")
    if not moment.in_flight:
        assert len(sequence_a(harness).block_table) == 0, "held by one that is gone"
    harness.run()
    harness.check_outputs()
    assert (harness.ends["a"].finish_reason == "abort") is not had_ended


@pytest.mark.parametrize("context_tokens", range(13, 22))
def test_logits_not_finite_at_any_token_cost_one_request(context_tokens):
    """At its first token or later: the others' outputs are as alone, one that shares its prefix included."""
    bad_prompt = (*PREFIX, 66)
    harness = Harness(
        num_blocks=40, is_poisoned=lambda tokens: tokens[12:13] == (66,) and len(tokens) >= context_tokens
    )
    harness.submit(request("sharer", (*PREFIX, 1), max_tokens=14))
    harness.step()
    harness.submit(request("bad", bad_prompt, max_tokens=12))
    harness.submit(request("other", tuple(range(9)), max_tokens=12))
    harness.run()
    assert harness.ends["bad"].finish_reason == "error"
    assert len(harness.outputs["bad"]) == context_tokens - 13
    for name in ("sharer", "other"):
        assert (harness.outputs[name], "length") == expected_outputs(harness.submits[name], 160, 1000)
    again = harness.submit(request("again", bad_prompt, max_tokens=1))
    assert again.matched_blocks == 0, "what it computed is not reused"


def test_a_prefix_that_went_bad_is_taken_from_who_waits_with_it():
    """One that pinned the failed request's blocks before it failed computes them itself."""
    prompt = tuple(range(60, 73))
    harness = Harness(num_blocks=40, max_num_seqs=1, is_poisoned=lambda tokens: len(tokens) == 15)
    harness.submit(request("bad", prompt, max_tokens=9))
    harness.step()
    assert harness.submit(request("waits", prompt, max_tokens=2)).matched_blocks == 3
    harness.pool.events.drain()
    while "bad" not in harness.ends:
        harness.step()
    removed = [event for event in harness.pool.events.drain().events if isinstance(event, BlockRemoved)]
    assert len(removed) == 3
    before = harness.executor.computed_tokens
    harness.run()
    assert harness.executor.computed_tokens - before == 13 + 1
    assert (harness.outputs["waits"], "length") == expected_outputs(harness.submits["waits"], 160, 1000)


@pytest.mark.parametrize("foresees", [False, True], ids=["blind", "foreseeing"])
def test_a_long_prompt_neither_blocks_nor_starves_decodes(foresees):
    """32k tokens, scaled to a budget of 64: every step has every decode, and prefills with the rest."""
    harness = Harness(
        num_blocks=1200, max_num_seqs=9, max_step_tokens=64, max_context_tokens=5000, foresees=foresees
    )
    for index in range(8):
        harness.submit(request(f"short{index}", (index, 1, 2), max_tokens=200))
    harness.step()
    harness.submit(request("long", tuple(index % 97 for index in range(4096)), max_tokens=2))
    while "long" not in harness.ends:
        step = harness.begin()
        tokens = {chunk.sequence.request_id: chunk.num_tokens for chunk in step.chunks}
        assert all(tokens[f"short{index}"] == 1 for index in range(8))
        assert tokens["long"] in (56, 4096 % 56, 1)
        harness.end()
    assert len(harness.steps) == 1 + -(-4096 // 56) + 1
    harness.submit(request("late", (5, 6), max_tokens=1))
    harness.step()
    assert "late" in harness.ends
    harness.run()
    harness.check_outputs()
