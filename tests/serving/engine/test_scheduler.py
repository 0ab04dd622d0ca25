"""What the scheduler promises, on cases small enough to follow. Random traces: test_scheduler_traces."""

import msgspec
import numpy as np
import pytest

from serving.engine.scheduled_step import build_plan
from serving.engine.sequence import SequenceState
from serving.messages import Accepted, Refused
from tests.serving.engine.harness import Harness, expected_outputs, request

PROMPT = tuple(range(1, 13))  # three blocks of four


def chunks_of(step):
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in step.chunks]


def test_decodes_come_first_and_prefill_chunks_fill_the_rest():
    """A long prompt, of a better class even, gets what those who are decoding leave of the budget."""
    harness = Harness(num_blocks=64, max_step_tokens=8)
    harness.submit(request("a", (1, 2, 3), max_tokens=20, priority=1))
    harness.step()
    harness.submit(request("long", tuple(range(20)), max_tokens=20))
    steps = []
    for _ in range(4):
        steps.append(chunks_of(harness.begin()))
        harness.end()
    assert steps == [
        [("a", 1), ("long", 7)],
        [("a", 1), ("long", 7)],
        [("a", 1), ("long", 6)],
        [("long", 1), ("a", 1)],  # now both decode, in their classes' order
    ]
    harness.run()
    harness.check_outputs()


def test_waiting_sequences_are_admitted_by_priority_then_arrival():
    """A lower priority number goes first, and within a class nobody is overtaken."""
    harness = Harness(num_blocks=64, max_num_seqs=1)
    for name, priority in (("b1", 1), ("a1", 0), ("b2", 1), ("a2", 0)):
        harness.submit(request(name, (1, 2), max_tokens=1, priority=priority))
    harness.run()
    assert [chunks_of(step)[0][0] for step in harness.steps] == ["a1", "a2", "b1", "b2"]


def test_a_running_prefill_goes_before_a_new_one():
    """What has begun is finished first, so two long prompts do not both wait for their first token."""
    harness = Harness(num_blocks=64, max_step_tokens=8)
    harness.submit(request("first", tuple(range(12)), priority=1))
    harness.step()
    harness.submit(request("second", tuple(range(50, 58)), priority=0))
    assert chunks_of(harness.begin()) == [("first", 4), ("second", 4)]


def test_a_cached_prompt_still_computes_its_last_token():
    """A full-prompt hit leaves one block to compute, because the last token's logits are wanted."""
    harness = Harness(num_blocks=16)
    harness.submit(request("a", PROMPT, max_tokens=2))
    harness.run()
    reply = harness.submit(request("b", PROMPT, max_tokens=2))
    assert reply.matched_blocks == 2
    step = harness.begin()
    assert chunks_of(step) == [("b", 4)]
    assert (step.prefix_hit_tokens, step.prefix_query_tokens) == (8, 12)
    harness.run()
    assert harness.outputs["a"] == harness.outputs["b"]
    harness.check_outputs()


def test_generated_tokens_are_reused_as_a_prefix():
    """A conversation's next turn finds the blocks of the answer before it."""
    harness = Harness(num_blocks=16)
    harness.submit(request("a", PROMPT, max_tokens=9))
    harness.run()
    turn = PROMPT + harness.outputs["a"]
    assert harness.submit(request("b", (*turn, 5, 6))).matched_blocks == 5  # 20 of 21 tokens computed
    harness.run()
    harness.check_outputs()


def test_another_tenant_finds_nothing():
    """The same prompt under another hash root shares no block."""
    harness = Harness(num_blocks=16)
    harness.submit(request("a", PROMPT))
    harness.run()
    assert harness.submit(request("b", PROMPT, hash_root=b"s" * 16)).matched_blocks == 0


def test_a_prompt_computed_meanwhile_is_found_at_admission():
    """Of equal prompts accepted together, those admitted later do not compute it again."""
    harness = Harness(num_blocks=32, max_num_seqs=1)
    for name in "ab":
        assert harness.submit(request(name, PROMPT, max_tokens=1)).matched_blocks == 0
    harness.run()
    assert harness.executor.computed_tokens == 12 + 4
    harness.check_outputs()


def test_reservations_are_counted_until_they_are_blocks():
    """Headroom falls by what was accepted, stays while blocks are allocated, and returns at the end."""
    harness = Harness(num_blocks=10)
    assert harness.submit(request("a", PROMPT, max_tokens=8, reserve_blocks=6)).reserved_blocks == 6
    refused = harness.submit(request("b", PROMPT[::-1], reserve_blocks=5))
    assert isinstance(refused, Refused)
    assert (refused.headroom_blocks, refused.permanent) == (4, False)
    harness.step()
    load = harness.scheduler.load()
    assert load.blocks_reserved == 3 and load.blocks_free + load.blocks_evictable == 7
    harness.run()
    assert isinstance(harness.submit(request("b", PROMPT[::-1], reserve_blocks=10)), Accepted)


def test_a_prefix_in_use_costs_nothing_and_an_evictable_one_costs_its_blocks():
    """Sharing with a running reader takes no room; pinning a cached block does."""
    harness = Harness(num_blocks=8)
    harness.submit(request("a", PROMPT, max_tokens=1))
    harness.run()
    assert isinstance(harness.submit(request("too much", PROMPT, reserve_blocks=8)), Accepted)
    harness.abort("too much")
    pinned = harness.submit(request("b", PROMPT, max_tokens=30, reserve_blocks=5))
    assert (pinned.reserved_blocks, pinned.matched_blocks) == (5, 2)
    shared = harness.submit(request("c", PROMPT, max_tokens=2, reserve_blocks=5))
    assert (shared.reserved_blocks, shared.matched_blocks) == (3, 2)
    assert harness.scheduler.load().blocks_reserved == 6
    assert harness.submit(request("d", (9,), reserve_blocks=1)).headroom_blocks == 0


def test_a_demand_beyond_the_pool_is_the_whole_pool():
    """An idle replica accepts whatever prompt fits it, however much growth is hoped for."""
    harness = Harness(num_blocks=4)
    assert harness.submit(request("a", (1,), reserve_blocks=99)).reserved_blocks == 4


@pytest.mark.parametrize(
    ("token_ids", "why"),
    [
        ((), "the prompt is empty"),
        (tuple(range(32)), "more than 8 blocks can hold"),
        (tuple(range(20)), "no room in a context of 20"),
    ],
)
def test_what_can_never_run_is_refused_for_good(token_ids, why):
    """An empty prompt, and one that with one new token fits neither pool nor context."""
    harness = Harness(num_blocks=8, max_context_tokens=20 if len(token_ids) == 20 else 100)
    refused = harness.submit(request("a", token_ids))
    assert isinstance(refused, Refused) and refused.permanent and why in refused.why
    assert isinstance(harness.submit(request("b", (1,))), Accepted)


def test_a_live_id_is_refused_until_its_end_has_been_told():
    """Nobody could tell two requests of one name apart; afterwards the name is free again."""
    harness = Harness(num_blocks=8)
    harness.submit(request("a", (1, 2)))
    assert harness.submit(request("a", (3,))).why == "duplicate request id"
    harness.abort("a")
    assert harness.submit(request("a", (3,))).permanent
    harness.run()
    assert isinstance(harness.submit(request("a", (3,))), Accepted)


def test_a_lone_sequence_that_fills_the_pool_ends_with_length():
    """There is nobody to preempt and nothing to wait for."""
    harness = Harness(num_blocks=3)
    harness.submit(request("a", (1, 2), max_tokens=100))
    harness.run()
    assert harness.ends["a"].finish_reason == "length"
    assert len(harness.outputs["a"]) == 11  # the last of them needs no slot
    harness.check_outputs()


def test_the_context_limit_ends_with_length():
    """Prompt and outputs together never exceed the context."""
    harness = Harness(num_blocks=30, max_context_tokens=10)
    harness.submit(request("a", (1, 2), max_tokens=100))
    harness.run()
    assert harness.ends["a"].finish_reason == "length" and len(harness.outputs["a"]) == 8


def test_a_stop_token_ends_with_stop_and_is_delivered():
    """Generation ends at the first stop token, which is the last id of the delta."""
    stop = expected_outputs(request("a", PROMPT, max_tokens=5), 1000, 1000)[0][3]
    harness = Harness(num_blocks=30)
    harness.submit(request("a", PROMPT, max_tokens=50, stop_token_ids=(stop,)))
    harness.run()
    assert harness.ends["a"].finish_reason == "stop" and harness.outputs["a"][-1] == stop
    harness.check_outputs()


def test_the_victim_is_the_least_computed_of_the_lowest_class():
    """Work is thrown away where least was done, and never of a better class while a lower one runs."""
    harness = Harness(num_blocks=9, max_step_tokens=64)
    harness.submit(request("top", (1, 2, 3), max_tokens=30, priority=0))
    harness.submit(request("more", tuple(range(11)), max_tokens=30, priority=1))
    harness.submit(request("less", tuple(range(40, 47)), max_tokens=30, priority=1))
    victims = []
    while harness.step() and len(victims) < 2:
        for name, sequence in harness.sequences.items():
            if sequence.num_preemptions and name not in victims:
                victims.append(name)
    assert victims == ["less", "more"]
    harness.run()
    harness.check_outputs()


def test_room_promised_to_the_running_is_not_given_to_the_waiting():
    """Who reserved its growth gets it: a newcomer that reserved nothing waits instead of taking it."""
    harness = Harness(num_blocks=8)
    harness.submit(request("a", PROMPT, max_tokens=12, reserve_blocks=6))
    harness.submit(request("b", PROMPT[::-1], max_tokens=20, reserve_blocks=0))
    harness.run()
    harness.check_outputs()
    assert not any(sequence.num_preemptions for sequence in harness.sequences.values())
    assert harness.sequences["b"].admitted_s == 12.0, "once a had ended"


def pin_three_of_eight_blocks():
    """A harness in which a waiting request of the last class holds three cached blocks."""
    harness = Harness(num_blocks=8, max_num_seqs=1, max_step_tokens=64)
    harness.submit(request("before", (*PROMPT, 1), max_tokens=1))
    harness.run()
    harness.submit(request("pins", (*PROMPT, 1), max_tokens=1, priority=9))
    assert harness.pool.num_available == 5
    return harness


def test_a_hold_of_one_that_waits_does_not_block_the_head_of_the_line():
    """A prompt of seven blocks is admitted though three of eight are pinned by one behind it."""
    harness = pin_three_of_eight_blocks()
    harness.submit(request("head", tuple(range(60, 88)), max_tokens=2))
    assert chunks_of(harness.begin()) == [("head", 28)]
    harness.run()
    harness.check_outputs()


def test_growth_takes_holds_of_the_waiting_before_it_preempts():
    """A pinned prefix costs nothing to give up; computed work does."""
    harness = pin_three_of_eight_blocks()
    harness.submit(request("grows", (60, 61), max_tokens=24))
    harness.run()
    harness.check_outputs()
    assert harness.sequences["grows"].num_preemptions == 0


def test_a_preempted_sequence_gets_its_cached_blocks_back():
    """Preemption drops the computed count, but blocks nobody took are found again by their hashes."""
    harness = Harness(num_blocks=8, max_step_tokens=64)
    for name, start in (("a", 0), ("b", 40)):
        harness.submit(request(name, tuple(range(start, start + 12)), max_tokens=16))
    harness.run()
    preempted = [s for s in harness.sequences.values() if s.num_preemptions]
    assert preempted
    alone = sum(s.num_tokens - 1 for s in harness.sequences.values())
    recomputed = harness.executor.computed_tokens - alone
    assert 0 < recomputed < sum(s.tokens_when_preempted for s in preempted)
    harness.check_outputs()


def test_not_finite_logits_end_one_request_and_no_other():
    """The row's request ends in error; its neighbours in the batch go on, and its blocks are not reused."""
    harness = Harness(num_blocks=32, is_poisoned=lambda tokens: tokens[0] == 66 and len(tokens) > 13)
    harness.submit(request("bad", (66, *PROMPT[1:]), max_tokens=8))
    harness.submit(request("good", PROMPT, max_tokens=8))
    harness.run()
    assert harness.ends["bad"].finish_reason == "error" and "not finite" in harness.ends["bad"].error
    assert len(harness.outputs["bad"]) == 2
    assert (harness.outputs["good"], "length") == expected_outputs(harness.submits["good"], 128, 1000)
    assert harness.submit(request("again", (66, *PROMPT[1:]))).matched_blocks == 0


def test_blocks_of_a_step_in_flight_are_not_released_by_an_abort():
    """Until the step completes its writes may land, so nobody else may own its blocks."""
    harness = Harness(num_blocks=4)
    harness.submit(request("a", PROMPT, max_tokens=8))
    harness.begin()
    available = harness.pool.num_available
    assert harness.abort("a") and not harness.abort("a")
    assert harness.pool.num_available == available
    harness.end()
    assert harness.ends["a"].finish_reason == "abort" and harness.outputs["a"] == ()
    harness.run()


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_abort_at_any_moment_ends_its_request_and_only_that(name, in_flight):
    """Waiting, prefilling, decoding, preempted or in flight: one end each, and no block lost."""
    for moment in range(60):
        harness = Harness(num_blocks=7, max_num_seqs=2, max_step_tokens=6)
        for other, start in (("a", 0), ("b", 20), ("c", 40)):
            harness.submit(request(other, tuple(range(start, start + 9)), max_tokens=10))
        for _ in range(moment):
            harness.step()
        if in_flight:
            harness.begin()
        was_live = harness.abort(name)
        harness.run()
        harness.check_outputs()
        assert was_live == (harness.ends[name].finish_reason == "abort")
        if not was_live and moment > 50:
            return
    raise AssertionError("the request never ended by itself")


@pytest.mark.parametrize("num_blocks", range(4, 16))
def test_everyone_finishes_however_small_the_pool(num_blocks):
    """From the smallest pool that holds one prompt up, outputs are those of a request alone."""
    harness = Harness(num_blocks=num_blocks, max_step_tokens=7)
    for index in range(5):
        harness.submit(request(str(index), (*PROMPT[:8], *range(index)), max_tokens=9, seed=index))
    harness.run()
    harness.check_outputs()
    assert sum(step.num_preemptions for step in harness.steps) > 0 or num_blocks > 9


def test_times_come_with_the_first_token_only():
    """Queue and prefill time are told once; the harness's clock ticks once a step."""
    harness = Harness(num_blocks=32, max_num_seqs=1, max_step_tokens=8)
    harness.submit(request("a", PROMPT, max_tokens=1))
    harness.submit(request("b", PROMPT, max_tokens=1))
    harness.run()
    assert harness.ends["a"].times.queue_ms == 0 and harness.ends["a"].times.prefill_ms == 2000
    times = harness.ends["b"].times
    assert (times.queue_ms, times.prefill_ms, times.cached_tokens) == (2000, 1000, 8)


def test_load_tells_backlog_and_decode_context():
    """Backlog is what remains to prefill; decode KV is the context of those who decode."""
    harness = Harness(num_blocks=32, max_num_seqs=2, max_step_tokens=14)
    for name, length in (("a", 12), ("b", 9), ("c", 5)):
        harness.submit(request(name, tuple(range(length))))
    load = harness.scheduler.load()
    assert (load.num_running, load.num_waiting, load.prefill_backlog_tokens) == (0, 3, 26)
    harness.step()  # all of a, two tokens of b
    load = harness.scheduler.load()
    assert (load.num_running, load.num_waiting, load.last_submission) == (2, 1, 3)
    assert (load.prefill_backlog_tokens, load.decode_kv_tokens) == (7 + 5, 13)
    assert load.blocks_total - load.blocks_free - load.blocks_evictable == 6


def test_a_plan_lays_out_each_sequence_as_plan_py_says():
    """Worked out by hand: a decode of `a` at position 5 and a prefill chunk of `b`, blocks of four."""
    harness = Harness(num_blocks=32, max_step_tokens=8)
    harness.submit(request("a", (11, 12, 13, 14, 15), max_tokens=4, seed=-1))
    harness.step()
    harness.submit(request("b", tuple(range(20, 30)), max_tokens=4))
    plan, sampling = build_plan(harness.begin(), 4)
    a, b = (list(harness.sequences[name].block_table) for name in "ab")
    assert plan.token_ids.tolist() == [harness.outputs["a"][0], *range(20, 27)]
    assert plan.positions.tolist() == [5, *range(7)]
    assert plan.slot_mapping.tolist() == [
        4 * a[1] + 1,
        *(4 * b[0] + i for i in range(4)),
        *(4 * b[1] + i for i in range(3)),
    ]
    assert plan.query_start.tolist() == [0, 1, 8] and plan.context_lens.tolist() == [6, 7]
    assert plan.block_tables.tolist() == [[*a, 0], b]
    assert plan.logits_rows.tolist() == [0]  # b's prompt goes on
    assert sampling.position.tolist() == [6] and sampling.seed.tolist() == [2**64 - 1]
    assert all(array.dtype == np.int32 for array in (plan.token_ids, plan.positions, plan.slot_mapping))
    assert harness.sequences["b"].state is SequenceState.RUNNING


def test_one_that_was_sent_in_the_belief_of_less_backlog_is_refused_and_told():
    """16 prompt tokens wait: a limit of 15 refuses, one of 16 or none accepts; decodes are no backlog."""
    harness = Harness(num_blocks=64, max_step_tokens=16)
    harness.submit(request("a", tuple(range(20, 36)), max_tokens=4))
    asked = request("b", PROMPT, reserve_blocks=4)
    refused = harness.submit(msgspec.structs.replace(asked, max_backlog_tokens=15))
    assert isinstance(refused, Refused) and refused.is_busy and not refused.permanent
    assert refused.backlog_tokens == 16
    assert isinstance(harness.submit(msgspec.structs.replace(asked, max_backlog_tokens=16)), Accepted)
    harness.step()
    harness.step()
    later = request("c", PROMPT, reserve_blocks=4)
    assert isinstance(harness.submit(msgspec.structs.replace(later, max_backlog_tokens=0)), Accepted)
