import itertools
import threading
import time

import pytest

from serving.engine import engine as engine_module
from serving.engine.block_pool import BlockPool
from serving.engine.engine import Engine, EngineIdentity
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduler import Scheduler
from serving.engine.step_time import StepShape, StepTimeModel
from serving.messages import Accepted, Refused, StepFrame, decode, encode
from tests.fakes import FakeExecutor
from tests.serving.engine.harness import VOCAB_SIZE, expected_outputs, request
from tests.serving.engine.test_step_time import SMOLLM2

IDENTITY = EngineIdentity(replica_id="r1", model="m", region="here", epoch=7)


def make_engine(num_blocks=64, executor=None, clock=time.perf_counter, block_tokens=4, **limits):
    limits = {"max_num_seqs": 8, "max_step_tokens": 16, "max_context_tokens": 1000, **limits}
    return Engine(
        Scheduler(BlockPool(num_blocks, block_tokens), SchedulerLimits(**limits)),
        executor or FakeExecutor(num_blocks, block_tokens, VOCAB_SIZE),
        StepTimeModel(SMOLLM2, "float32"),
        IDENTITY,
        clock,
    )


def ticking(tick_s):
    """A clock that moves by `tick_s` whenever it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * tick_s


def collect(frames):
    """Output ids, and finish reasons as a list, of every request in `frames`."""
    outputs, ends = {}, {}
    for frame in frames:
        for delta in frame.deltas:
            outputs[delta.request_id] = outputs.get(delta.request_id, ()) + delta.token_ids
            if delta.finish_reason is not None:
                ends.setdefault(delta.request_id, []).append(delta.finish_reason)
    return outputs, ends


class Running:
    """An engine on a step thread of its own, for the length of a with block."""

    def __init__(self, engine, idle=None):
        self.engine, self.frames, self.failure = engine, [], None
        self._idle = idle
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.engine.run(self.frames.append, self._idle)
        except RuntimeError as failure:
            self.failure = failure

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.engine.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.engine.check_integrity()

    def wait_for(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.002)


def test_requests_from_many_threads_all_end_once_with_their_own_tokens():
    """Submits and aborts race with a running step thread, in a pool that is too small for all."""
    engine = make_engine(num_blocks=24)
    submits = [
        request(f"{thread}-{index}", (thread, index, 3, 4, 5, 6), max_tokens=5 + index, seed=thread)
        for thread in range(4)
        for index in range(20)
    ]
    replies = {}

    def submit_some(thread):
        for submit in submits[thread * 20 : (thread + 1) * 20]:
            replies[submit.request_id] = engine.submit([submit])[0]
            if submit.request_id.endswith("7"):
                engine.abort([submit.request_id, "never heard of"])

    with Running(engine) as running:
        threads = [threading.Thread(target=submit_some, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running.wait_for(lambda: len(collect(list(running.frames))[1]) == len(submits))
    outputs, ends = collect(running.frames)
    assert sorted(reply.submission for reply in replies.values()) == list(range(1, len(submits) + 1))
    for submit in submits:
        expected = expected_outputs(submit, 24 * 4, 1000)
        (reason,) = ends[submit.request_id]
        if reason == "abort":
            assert submit.request_id.endswith("7")
        else:
            assert (outputs[submit.request_id], reason) == expected
    sequences = [frame.load.sequence for frame in running.frames]
    assert sequences == sorted(set(sequences))
    assert running.frames[-1].load.last_submission == len(submits)


def test_a_frame_crosses_the_wire_unchanged():
    """All that a step tells is in the message types: it decodes to itself."""
    engine = make_engine()
    engine.submit([request("a", (1, 2, 3))])
    frame = engine.step()
    assert decode(encode([frame]), list[StepFrame]) == [frame]
    assert frame.deltas[0].times is not None and frame.load.replica_id == "r1" and frame.load.epoch == 7


def test_answers_come_in_order_and_refusals_do_not_count_as_submissions():
    """Duplicates and empty prompts are refused for good; accepted ones are numbered without gaps."""
    engine = make_engine()
    replies = engine.submit([request("a", (1,)), request("a", (1,)), request("b", ()), request("c", (2,))])
    assert [type(reply) for reply in replies] == [Accepted, Refused, Refused, Accepted]
    assert replies[1].permanent and replies[2].permanent
    assert (replies[0].submission, replies[3].submission) == (1, 2)
    assert engine.load().last_submission == 2


def test_stats_say_what_the_step_did():
    """Times by the given clock; tokens, FLOPs and bytes by the step; predicted before it was learnt."""
    model = StepTimeModel(SMOLLM2, "float32")
    engine = make_engine(clock=ticking(0.004), max_step_tokens=8)
    assert engine.step().stats is None and engine.step() is None  # the clock goes on meanwhile
    engine.submit([request("a", tuple(range(10, 15)), max_tokens=3)])
    (first,) = engine.step().deltas
    assert (first.times.queue_ms, first.times.prefill_ms) == pytest.approx((4.0, 8.0))
    engine.submit([request("b", tuple(range(30, 40)), max_tokens=3)])
    before = engine.load().step
    stats = engine.step().stats
    shape = StepShape(tokens=8, kv_tokens=13, num_logits=1, attention_pairs=30.0)
    assert (stats.step_ms, stats.schedule_ms) == pytest.approx((8.0, 4.0))
    assert stats.predicted_ms == before.predict_ms(8, 13, 1, 30.0)
    assert stats.floor_ms == model.machine.floor_ms(stats.flops, stats.bytes_moved)
    assert (stats.ridge_flop_per_byte, stats.bound) == (model.machine.ridge_flop_per_byte, "memory")
    assert (stats.batch_size, stats.prefill_tokens, stats.decode_tokens) == (2, 7, 1)
    assert (stats.flops, stats.bytes_moved) == (model.flops(shape), model.bytes_moved(shape))
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens, stats.num_preemptions) == (0, 10, 0)


def test_the_next_step_is_predicted_as_the_fullest_there_can_be():
    """An idle frame too: a long prompt may be submitted right after it, and is not a hang."""
    engine = make_engine()
    idle = engine.step()
    fullest = engine.load().max_step_tokens
    assert idle.next_step_ms >= idle.load.step.predict_ms(fullest, fullest) > 0.0
    engine.submit([request("a", (1, 2, 3), max_tokens=2)])
    assert engine.step().next_step_ms > 0.0
    engine.step()
    assert engine.step() is None


def test_an_abort_without_a_step_is_still_told():
    """A request that ends between steps has its delta in a frame of its own, with the load."""
    engine = make_engine()
    engine.submit([request("a", (1, 2, 3))])
    engine.abort(["a"])
    frame = engine.step()
    assert [delta.finish_reason for delta in frame.deltas] == ["abort"] and frame.stats is None
    assert frame.load.num_waiting == 0
    assert engine.step() is None


def test_a_dying_executor_costs_every_live_request_an_answer_and_nobody_silence():
    """The error is raised, after each request, running or waiting, was told once that it is lost."""

    class Dying(FakeExecutor):
        def launch(self, plan, sampling):
            if self.num_steps == 3:
                raise RuntimeError("device lost")
            return super().launch(plan, sampling)

    engine = make_engine(executor=Dying(64, 4, VOCAB_SIZE), max_num_seqs=2)
    engine.submit([request(name, (1, 2, 3), max_tokens=50) for name in "abcd"])
    with Running(engine) as running:
        running.wait_for(lambda: running.failure is not None)
    assert str(running.failure) == "device lost"
    assert collect(running.frames)[1] == {name: ["lost"] for name in "abcd"}
    assert all(delta.error for delta in running.frames[-1].deltas)
    assert running.frames[-1].load.draining
    (late,) = engine.submit([request("late", (1,))])
    assert isinstance(late, Refused) and not late.permanent


def test_stopping_tells_the_unfinished():
    """`stop` ends the loop after the step in flight; what is live then ends as lost, once."""
    engine = make_engine()
    engine.submit([request("a", (1, 2, 3), max_tokens=900)])
    with Running(engine) as running:
        running.wait_for(lambda: len(running.frames) > 2)
    outputs, ends = collect(running.frames)
    expected, _ = expected_outputs(request("a", (1, 2, 3), max_tokens=900), 64 * 4, 1000)
    assert ends == {"a": ["lost"]} or ends == {"a": ["length"]}
    assert outputs["a"] == expected[: len(outputs["a"])]


def test_an_idle_engine_sleeps_and_a_submit_wakes_it():
    """Without work the clock is not even read; the first submit is served at once."""
    reads = itertools.count()
    engine = make_engine(clock=lambda: next(reads) * 1e-3)
    with Running(engine) as running:
        running.wait_for(lambda: running.frames)  # the first load report
        before = next(reads)
        time.sleep(0.1)
        assert next(reads) == before + 1
        engine.submit([request("a", (1, 2, 3), max_tokens=2)])
        running.wait_for(lambda: "a" in collect(list(running.frames))[1])


def test_an_idle_engine_keeps_its_ranks_alive(monkeypatch):
    """`idle` is called at intervals while nothing happens, and no more frames come of it."""
    monkeypatch.setattr(engine_module, "IDLE_INTERVAL_S", 0.01)
    calls = []
    with Running(make_engine(), idle=lambda: calls.append(1)) as running:
        running.wait_for(lambda: len(calls) >= 3)
        assert len(running.frames) == 1


def test_draining_is_told_at_once_and_refuses_nobody():
    """The Router learns it without waiting for a step; what was already on its way is served."""
    engine = make_engine()
    with Running(engine) as running:
        running.wait_for(lambda: running.frames)
        engine.drain()
        running.wait_for(lambda: running.frames[-1].load.draining)
        assert isinstance(engine.submit([request("a", (1, 2, 3), max_tokens=2)])[0], Accepted)
        running.wait_for(lambda: "a" in collect(list(running.frames))[1])
    assert collect(running.frames)[1] == {"a": ["length"]}
