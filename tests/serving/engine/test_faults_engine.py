"""An executor that fails in the middle costs every live request one answer, and the pool no block."""

import pytest

from serving.messages import BlockStored, Refused
from tests.fakes import FakeExecutor
from tests.serving.engine.harness import VOCAB_SIZE, expected_outputs, request
from tests.serving.engine.test_engine import collect, make_engine

PROMPTS = {"a": tuple(range(20)), "b": (1, 2, 3), "c": tuple(range(40, 60)), "d": (9, 9)}


class FailingAt(FakeExecutor):
    """Writes its step's keys and values, and fails before it can answer."""

    def __init__(self, num_blocks, fails_at):
        super().__init__(num_blocks, 4, VOCAB_SIZE)
        self.fails_at = fails_at

    def launch(self, plan, sampling):
        drawn = super().launch(plan, sampling)
        if self.num_steps == self.fails_at:
            raise RuntimeError("device lost")
        return drawn


@pytest.mark.parametrize("fails_at", range(1, 14))
def test_a_step_that_raises(fails_at):
    """At whatever step: what was told stays true, each request hears once of its loss, no block leaks."""
    engine = make_engine(num_blocks=14, executor=FailingAt(14, fails_at), max_num_seqs=3, max_step_tokens=9)
    submits = [request(name, prompt, max_tokens=12) for name, prompt in PROMPTS.items()]
    engine.submit(submits)
    frames = []
    with pytest.raises(RuntimeError, match="device lost"):
        engine.run(frames.append)
    engine.check_integrity()
    outputs, ends = collect(frames)
    for submit in submits:
        name = submit.request_id
        expected, reason = expected_outputs(submit, 14 * 4, 1000)
        assert ends[name] in (["lost"], [reason])
        got = outputs.get(name, ())
        assert got == (expected if ends[name] == [reason] else expected[: len(got)])
    load = engine.load()
    assert load.blocks_free + load.blocks_evictable == load.blocks_total == 14
    assert (load.blocks_reserved, load.num_running, load.num_waiting) == (0, 0, 0)
    assert isinstance(engine.submit([request("late", (1,))])[0], Refused)


def test_frames_carry_the_block_events_of_their_step():
    """Each event is published once, in order, and the snapshot is where they lead."""
    engine = make_engine()
    engine.submit([request("a", tuple(range(9)), max_tokens=8)])
    batches = []
    while (frame := engine.step()) is not None:
        batches += [frame.block_events] if frame.block_events else []
    numbers = [batch.first_number + i for batch in batches for i in range(len(batch.events))]
    assert numbers == [1, 2, 3, 4] and len(batches) > 1
    stored = [event.block_hash for batch in batches for event in batch.events]
    assert all(isinstance(event, BlockStored) for batch in batches for event in batch.events)
    snapshot = engine.block_snapshot()
    assert (snapshot.last_number, list(snapshot.block_hashes)) == (4, stored)
