"""Peers in processes of their own, and the turns that engines take."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.bench.engine.comparison import WARM_UP_TOKENS, compare
from serving.bench.engine.figures import Load, Sample
from serving.bench.engine.peers import Peer, PeerFailed, PeerSpec

FAKE = PeerSpec("fake", Path(sys.executable), Path(__file__).parent / "fake_peer.py")
LOADS = (Load("decode", 1, 4, 8), Load("decode", 3, 4, 8))


@pytest.fixture
def peer(tmp_path) -> Iterator[Peer]:
    running = Peer(FAKE, tmp_path, threads=2, max_batch=3, max_tokens=16)
    yield running
    running.close()


def test_a_peer_answers_in_turn(peer):
    """Requests and answers keep their order, and what a library prints does not disturb them."""
    assert peer.description == "fake, 2 threads"
    assert peer.generate([[1], [7]], 2).output_ids == ((2, 3), (8, 9))
    answer = peer.generate([[5]], 3)
    assert answer.output_ids == ((6, 7, 8),)
    assert answer.token_times_s == ((0.1, 0.2, pytest.approx(0.3)),)
    assert answer.elapsed_s == pytest.approx(0.3)


def test_a_peer_that_ends_says_why(peer):
    """The error holds its last words and the script that mends environments."""
    with pytest.raises(PeerFailed, match=r"fake .* ended with status 1: out of cheese\. .*peers\.sh"):
        peer.generate([[-2]], 2)
    with pytest.raises(PeerFailed):
        peer.generate([[1]], 2)


def test_a_peer_that_cannot_load_says_why(tmp_path):
    """The traceback's last line names what is missing."""
    with pytest.raises(PeerFailed, match="FileNotFoundError: no model at"):
        Peer(FAKE, tmp_path / "nothing", threads=1, max_batch=1, max_tokens=16)


def test_an_answer_of_another_length_is_refused(peer):
    """A peer that ignores the number of tokens would be compared with unequal work."""
    with pytest.raises(PeerFailed, match=r"fake .*\[3\] tokens where \[2\]"):
        peer.generate([[-1]], 2)


def test_a_closed_peer_is_gone(tmp_path):
    """Closing stdin is all it takes to end it."""
    peer = Peer(FAKE, tmp_path, threads=1, max_batch=1, max_tokens=16)
    peer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, 0)


@pytest.mark.parametrize(
    ("name", "python", "why"),
    [("tgi", sys.executable, "choose from transformers"), ("vllm", "/no/such/python", r"peers\.sh")],
)
def test_a_peer_needs_a_name_and_an_interpreter(name, python, why):
    """Both are checked before anything is measured, and the error says what to do."""
    with pytest.raises(PeerFailed, match=why):
        PeerSpec.named(name, python)


class Recorder:
    """An engine that writes down when it ran, and fails when it is told to."""

    def __init__(self, name: str, log: list, fails_at: int | None = None) -> None:
        self.name, self._log, self._fails_at = name, log, fails_at
        self.pid = os.getpid()

    def run(self, prompts: list[tuple[int, ...]], new_tokens: int) -> Sample:
        self._log.append((self.name, len(prompts), new_tokens, prompts[0]))
        if self._fails_at is not None and len(self._log) > self._fails_at:
            raise PeerFailed(f"{self.name} is tired")
        return Sample(1.0, (), ())


def compared(engines, repeats):
    numbers = iter(range(100))
    beside = []
    results = compare(
        engines,
        LOADS,
        lambda load: [(next(numbers),)] * load.batch,
        repeats,
        beside=beside.append,
        settle_s=0.0,
    )
    assert beside == [LOADS[0]] * repeats + [LOADS[1]] * repeats
    return results


def test_engines_take_turns():
    """Another engine is first each repeat; all see the same prompts, no two repeats the same ones."""
    log: list = []
    results = compared([Recorder(name, log) for name in "abc"], repeats=2)
    of_first_load = [entry for entry in log if entry[1] == 1]
    assert "".join(name for name, *_ in of_first_load) == "abcabcbca"
    assert [tokens for _, _, tokens, _ in of_first_load] == [WARM_UP_TOKENS] * 3 + [8] * 6
    assert [prompt for *_, prompt in of_first_load] == [(0,)] * 3 + [(1,)] * 3 + [(2,)] * 3
    assert {key: len(samples) for key, samples in results.samples.items()} == {
        (name, load): 2 for name in "abc" for load in LOADS
    }


def test_an_engine_that_fails_drops_out():
    """The others go on, and the report can say why one is missing."""
    log: list = []
    results = compared([Recorder("a", log), Recorder("b", log, fails_at=4)], repeats=2)
    assert results.failures == {"b": "b is tired"}
    assert [name for name, *_ in log].count("b") == 3
    assert len(results.samples["a", LOADS[1]]) == 2
    assert len(results.samples["b", LOADS[0]]) == 1
