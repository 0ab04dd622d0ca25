"""Laws that hold on any trace of submits, aborts and steps. The harness checks integrity throughout."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.block_hash import hash_blocks
from serving.messages import Accepted, Refused
from tests.serving.engine.harness import Harness, request

SHARED = tuple(range(50, 66))  # prompts begin with a part of it, so that prefixes meet


@st.composite
def requests(draw, max_size=7):
    drawn = []
    for index in range(draw(st.integers(1, max_size))):
        prefix = SHARED[: draw(st.integers(0, 16))]
        tail = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)))
        drawn.append(
            request(
                str(index),
                prefix + tail,
                max_tokens=draw(st.integers(1, 20)),
                reserve_blocks=draw(st.integers(0, 12)),
                priority=draw(st.integers(0, 1)),
                seed=draw(st.integers(0, 2)),
                stop_token_ids=tuple(draw(st.lists(st.integers(0, 96), max_size=3))),
            )
        )
    return drawn


@st.composite
def harnesses(draw):
    return Harness(
        num_blocks=draw(st.integers(6, 24)),
        block_tokens=draw(st.integers(1, 5)),
        max_num_seqs=draw(st.integers(1, 5)),
        max_step_tokens=draw(st.integers(1, 24)),
        max_context_tokens=draw(st.sampled_from([24, 1000])),
        foresees=draw(st.booleans()),
        runs_ahead=draw(st.booleans()),
    )


def submit_lawfully(harness, submit):
    """Submit, and check the answer against the conservation of blocks."""
    before = harness.scheduler.load()
    room = before.blocks_free + before.blocks_evictable - before.blocks_reserved
    reply = harness.submit(submit)
    after = harness.scheduler.load()
    left = after.blocks_free + after.blocks_evictable - after.blocks_reserved
    if isinstance(reply, Accepted):
        assert left >= 0 or not submit.reserve_blocks, "promised more than there is"
        assert left == room - reply.reserved_blocks
    else:
        assert after == before and reply.headroom_blocks == room
        hashes = hash_blocks(submit.hash_root, submit.token_ids[:-1], harness.block_tokens)
        demand = max(min(submit.reserve_blocks, before.blocks_total), len(harness.pool.match(hashes)))
        assert reply.permanent or (submit.reserve_blocks and demand > room), "refused though there was room"
    return reply


def run_any_trace(harness, submits, data):
    """Submits, aborts and steps in any order, then all to the end. The harness asserts the laws."""
    left = list(submits)
    for _ in range(data.draw(st.integers(0, 40))):
        event = data.draw(st.sampled_from(["submit", "abort", "step", "begin", "step"]))
        if event == "submit" and left:
            submit_lawfully(harness, left.pop())
        elif event == "abort" and harness.submits:
            harness.abort(data.draw(st.sampled_from(sorted(harness.submits))))
        elif event == "begin" and len(harness.in_flight) < (2 if harness.runs_ahead else 1):
            harness.begin()
        elif harness.in_flight:
            harness.end()
        elif event == "step":
            harness.step()
    for submit in left:
        submit_lawfully(harness, submit)
    harness.run()
    harness.check_outputs()


@settings(max_examples=250, deadline=None)
@given(harnesses(), requests(), st.data())
def test_every_accepted_request_ends_once_with_the_outputs_it_has_alone(harness, submits, data):
    """Whatever the pool, the budget, the order of events and the aborts: nothing lost, leaked or mixed."""
    run_any_trace(harness, submits, data)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(harnesses(), requests(), st.data())
def test_the_same_on_ten_thousand_traces(harness, submits, data):
    """Conservation of blocks, readers' counts, order, decodes first, bounded preemption, everyone's end."""
    run_any_trace(harness, submits, data)


@settings(max_examples=80, deadline=None)
@given(requests(), st.integers(8, 24), st.integers(1, 5), st.integers(1, 24))
def test_the_prefix_cache_changes_no_output(submits, num_blocks, block_tokens, max_step_tokens):
    """With every prompt under a root of its own nothing is shared, and the outputs are the same."""
    outputs = []
    for is_shared in (True, False):
        harness = Harness(num_blocks, block_tokens, max_step_tokens=max_step_tokens)
        for submit in submits:
            root = submit.hash_root if is_shared else submit.request_id.encode() * 16
            harness.submit(msgspec.structs.replace(submit, hash_root=root, reserve_blocks=0))
        harness.run()
        harness.check_outputs()
        outputs.append(
            {name: (harness.outputs[name], end.finish_reason) for name, end in harness.ends.items()}
        )
    assert outputs[0] == outputs[1]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(0, 1)), min_size=2, max_size=6),
    st.integers(7, 14),
    st.integers(2, 12),
    st.booleans(),
)
def test_nobody_is_preempted_twice_without_a_token_between(shapes, num_blocks, max_step_tokens, foresees):
    """Under hard pressure, when all grow and nobody reserved, work still moves on (the harness looks)."""
    harness = Harness(num_blocks, max_step_tokens=max_step_tokens, foresees=foresees)
    for index, (prompt_tokens, max_tokens, priority) in enumerate(shapes):
        prompt = tuple(range(index, index + prompt_tokens))
        harness.submit(request(str(index), prompt, max_tokens=max_tokens, priority=priority))
    harness.run()
    harness.check_outputs()


@settings(max_examples=80, deadline=None)
@given(requests(max_size=5), st.integers(8, 24))
def test_honest_reservations_are_never_preempted(submits, num_blocks):
    """Who reserves all that it will use keeps it: without overcommitment there is no recomputation."""
    harness = Harness(num_blocks, max_step_tokens=9)
    for submit in submits:
        need = -(-(len(submit.token_ids) + submit.sampling.max_tokens) // 4)
        reply = harness.submit(msgspec.structs.replace(submit, reserve_blocks=need))
        if isinstance(reply, Refused):
            harness.step()
    harness.run()
    harness.check_outputs()
    assert all(step.num_preemptions == 0 for step in harness.steps)
