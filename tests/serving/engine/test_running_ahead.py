"""A step is scheduled and launched while the one before is in flight; nobody's outputs may tell."""

import pytest

from serving.engine.sequence import SequenceState
from tests.fakes import FakeExecutor
from tests.serving.engine.harness import VOCAB_SIZE, Harness, expected_outputs, request
from tests.serving.engine.test_engine import collect, make_engine

PROMPT = tuple(range(10, 19))


def second_token(submit):
    return expected_outputs(submit, 1000, 1000)[0][1]


def test_a_sequence_decodes_from_a_token_the_host_has_not_seen():
    """Its placeholder is in the plan of the second step, its own token in the sequence once that is known."""
    harness = Harness(num_blocks=8, runs_ahead=True)
    harness.submit(request("a", PROMPT, max_tokens=5))
    harness.begin()
    ahead = harness.begin()
    sequence = harness.sequences["a"]
    (chunk,) = ahead.chunks
    assert (chunk.start, chunk.num_tokens, chunk.is_decode) == (len(PROMPT), 1, True)
    assert sequence.num_pending == 2 and sequence.token_ids[chunk.start] == -1
    harness.end()
    assert sequence.num_pending == 1 and sequence.token_ids[chunk.start] == harness.outputs["a"][0]
    harness.run()
    harness.check_outputs()


def test_what_is_drawn_after_a_stop_token_is_dropped():
    """The step in flight computes an ended sequence once more: its blocks are free, nobody hears of it."""
    plain = request("a", PROMPT, max_tokens=9)
    harness = Harness(num_blocks=8, runs_ahead=True)
    harness.submit(request("a", PROMPT, max_tokens=9, stop_token_ids=(second_token(plain),)))
    harness.step()
    harness.step()
    assert harness.ends["a"].finish_reason == "stop" and len(harness.in_flight) == 1
    assert harness.pool.num_available == 8 and harness.scheduler.has_work
    harness.run()
    assert len(harness.steps) == 3
    harness.check_outputs()


def test_blocks_that_a_step_in_flight_writes_to_may_be_handed_out():
    """Steps run in order: who gets an ended sequence's blocks writes to them after it."""
    plain = request("a", PROMPT, max_tokens=9)
    harness = Harness(num_blocks=3, runs_ahead=True)
    harness.submit(request("a", PROMPT, max_tokens=9, stop_token_ids=(second_token(plain),)))
    harness.submit(request("b", tuple(range(40, 49)), max_tokens=3))
    harness.step()
    harness.step()
    assert "a" in harness.ends and len(harness.in_flight) == 1
    old = harness.in_flight[0][0].chunks[0].sequence
    assert old.state is SequenceState.FINISHED
    harness.begin()
    assert harness.sequences["b"].state is SequenceState.RUNNING
    harness.run()
    harness.check_outputs()


def test_the_last_token_by_length_is_known_ahead():
    """No step is wasted on a sequence that will have all it asked for."""
    harness = Harness(num_blocks=8, runs_ahead=True)
    harness.submit(request("a", PROMPT, max_tokens=3))
    harness.run()
    assert [len(step.chunks) for step in harness.steps] == [1, 1, 1]


def test_who_would_have_to_be_preempted_waits_for_the_step_in_flight():
    """Without a free block nothing is scheduled ahead; once the step is complete somebody may have ended."""
    harness = Harness(num_blocks=6, runs_ahead=True)
    harness.submit(request("a", tuple(range(11)), max_tokens=6))
    harness.submit(request("b", tuple(range(20, 31)), max_tokens=1))
    harness.begin()
    harness.begin()
    harness.end()
    assert harness.begin() is None and len(harness.in_flight) == 1
    harness.run()
    harness.check_outputs()
    assert all(step.num_preemptions == 0 for step in harness.steps)


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_with_two_steps_in_flight(steps):
    """It is told once, with the first of them; the second is computed for nobody."""
    harness = Harness(num_blocks=12, runs_ahead=True)
    harness.submit(request("a", PROMPT, max_tokens=9))
    harness.submit(request("b", tuple(range(40, 49)), max_tokens=9))
    for _ in range(steps):
        harness.step()
    while len(harness.in_flight) < 2:
        harness.begin()
    assert harness.abort("a") and not harness.abort("a")
    harness.end()
    assert harness.ends["a"].finish_reason == "abort"
    harness.run()
    harness.check_outputs()


def test_logits_not_finite_end_a_sequence_that_is_in_flight_again():
    """Its next token is computed from a placeholder that stands for none; the neighbour is as alone."""
    bad = (66, *PROMPT[1:])
    harness = Harness(
        num_blocks=12,
        runs_ahead=True,
        is_poisoned=lambda token_ids: token_ids[0] == 66 and len(token_ids) > len(bad),
    )
    harness.submit(request("bad", bad, max_tokens=9))
    harness.submit(request("good", PROMPT, max_tokens=9))
    harness.run()
    assert harness.ends["bad"].finish_reason == "error" and len(harness.outputs["bad"]) == 1
    assert (harness.outputs["good"], "length") == expected_outputs(harness.submits["good"], 48, 1000)


class Journal(FakeExecutor):
    """Writes down what the engine does when."""

    def __init__(self, fails_at=None):
        super().__init__(64, 4, VOCAB_SIZE, runs_ahead=True)
        self.events = []
        self._fails_at = fails_at

    def launch(self, plan, sampling):
        done = super().launch(plan, sampling)
        number = self.num_steps
        self.events.append(f"launch {number}")
        return Waiting(self, number, done.tokens())


class Waiting:
    def __init__(self, journal, number, token_ids):
        self._journal, self._number, self._token_ids = journal, number, token_ids

    def tokens(self):
        self._journal.events.append(f"wait {self._number}")
        if self._number == self._journal._fails_at:
            raise RuntimeError("device lost")
        return self._token_ids


def run_to_the_end(engine):
    frames = []
    while (frame := engine.step()) is not None:
        frames.append(frame)
    return frames


def test_the_engine_launches_a_step_before_it_waits_for_the_one_before():
    """So the device is never without work while the host looks at tokens."""
    journal = Journal()
    engine = make_engine(executor=journal)
    submits = [request(name, (*PROMPT, index), max_tokens=4) for index, name in enumerate("abc")]
    engine.submit(submits)
    outputs, _ = collect(run_to_the_end(engine))
    assert outputs == {s.request_id: expected_outputs(s, 256, 1000)[0] for s in submits}
    last = journal.num_steps
    order = ["launch 1"]
    for number in range(2, last + 1):
        order += [f"launch {number}", f"wait {number - 1}"]
    assert journal.events == [*order, f"wait {last}"]
    engine.check_integrity()


def test_a_step_launched_ahead_begins_when_the_one_before_ends():
    """Step times add up to the time that passed: none is counted twice."""
    now = iter(range(1000))
    engine = make_engine(executor=Journal(), clock=lambda: float(next(now)))
    engine.submit([request("a", PROMPT, max_tokens=6)])
    stats = [frame.stats for frame in run_to_the_end(engine) if frame.stats is not None]
    assert stats[0].step_ms == 4e3  # from its own scheduling, past that of the next, to its end
    assert all(later.step_ms == 3e3 for later in stats[1:-1])  # the scheduling of one step between two ends


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_device_that_is_lost_with_two_steps_in_flight(fails_at):
    """Whoever lives is told once; what was told before stays true."""
    engine = make_engine(executor=Journal(fails_at))
    submits = [request(name, (*PROMPT, index), max_tokens=6) for index, name in enumerate("ab")]
    engine.submit(submits)
    frames = []
    with pytest.raises(RuntimeError, match="device lost"):
        engine.run(frames.append)
    outputs, ends = collect(frames)
    assert ends == {"a": ["lost"], "b": ["lost"]}
    for submit in submits:
        told = outputs.get(submit.request_id, ())
        assert told == expected_outputs(submit, 256, 1000)[0][: len(told)]
