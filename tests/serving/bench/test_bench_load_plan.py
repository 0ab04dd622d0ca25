"""What is sent, and when: workloads, arrivals, and flags that make no sense."""

import json
from itertools import islice

import numpy as np
import pytest

from serving.bench.load import arrivals, sessions
from serving.bench.load.plan import Plan, parse_endpoint, parse_streams
from serving.errors import ConfigError
from serving.tokenizer import Tokenizer


def test_stories_are_what_they_always_were():
    """The default load: number first, so that no two prompts share a block; 64 tokens each."""
    first, second = islice(Plan(streams=(1,)).sessions(None, 0), 2)
    assert first.turns == (sessions.Turn("0 is my number. Tell me a story.", 64),)
    assert second.turns[0].text.startswith("1 ") and not second.system


def test_a_closed_loop_without_limits_sends_one_request_a_stream():
    """As the measurements in tests/benchmarks were made."""
    assert Plan(streams=(8,)).limits(8).requests == 8
    assert Plan(streams=(8,), requests=20).limits(8).requests == 20
    assert Plan(streams=(8,), duration_s=5).limits(8).requests is None


def test_generated_sessions_are_seeded_share_prompts_and_fit():
    """Equal seeds give equal sessions, others share nothing; system prompts recur, the first most often;
    the mean of turns is the one that arrivals count on; think times have their mean."""
    found = list(islice(sessions.generated(1, think_s=5.0), 4000))
    assert found[:50] == list(islice(sessions.generated(1, think_s=5.0), 50))
    systems = [session.system for session in found]
    assert not set(systems) & {session.system for session in islice(sessions.generated(2, 5.0), 100)}
    counts = sorted((systems.count(system) for system in set(systems)), reverse=True)
    assert len(counts) == 8 and counts[0] / counts[1] == pytest.approx(2, rel=0.25)
    turns = [len(session.turns) for session in found]
    assert np.mean(turns) == pytest.approx(sessions.MEAN_TURNS, rel=0.05)
    thinks = [turn.think_s for session in found for turn in session.turns[1:]]
    assert np.mean(thinks) == pytest.approx(5.0, rel=0.05)
    assert all(session.turns[0].think_s == 0 for session in found)
    capped = islice(sessions.generated(1, 0.0, max_tokens=8), 100)
    assert max(turn.max_tokens for session in capped for turn in session.turns) == 8


def test_a_word_is_about_a_token(embedded_model):
    """In the embedded model's vocabulary, within 5 %; and the longest session fits its context."""
    tokenizer = Tokenizer(embedded_model)
    trace = [(0, 2000, 5, [1, 2, 3, 4])]
    (session,) = replay(trace)
    assert len(tokenizer.encode(session.turns[0].text, add_special=False)) == pytest.approx(2000, rel=0.05)
    longest = 384 + 5 * (150 + 160)
    assert longest * 1.05 < 2048


def replay(lines, **plan):
    """The sessions of a Mooncake trace of (ms, input, output, ids)."""
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = replay.folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    made = Plan(trace=path, raw_times=True, **plan)
    made.check()
    trace = made.read()
    replay.notes = made.notes(trace)
    return list(made.sessions(trace, 0))


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    replay.folder = tmp_path


TRACE = [(0, 1100, 7, [0, 1, 2]), (2000, 1200, 9, [0, 1, 3]), (4000, 600, 5, [0, 9])]


def test_a_traces_prefixes_are_the_texts_prefixes():
    """Requests that share n blocks share 512 n words from the start, and no more; lengths are the trace's."""
    texts = [session.turns[0].text.split(" ") for session in replay(TRACE)]
    assert [len(text) for text in texts] == [1100, 1200, 600]
    assert shared(texts[0], texts[1]) == pytest.approx(1024, abs=5)
    assert shared(texts[0], texts[2]) == pytest.approx(512, abs=5)
    assert [session.turns[0].max_tokens for session in replay(TRACE)] == [7, 9, 5]


def shared(one, other):
    pairs = enumerate(zip(one, other, strict=False))
    return next(at for at, (a, b) in pairs if a != b)


def test_a_trace_is_replayed_at_its_times_or_scaled():
    """Speed 4 takes a quarter of the time; --rate replaces the times by a Poisson process of that rate."""
    assert [session.start_s for session in replay(TRACE)] == [0, 2, 4]
    assert [session.start_s for session in replay(TRACE, speed=4.0)] == [0, 0.5, 1]
    assert [session.start_s for session in replay(TRACE, rate=1.0)] != [0, 2, 4]


def test_a_traces_lengths_can_be_cut_and_that_is_told():
    """A cut prompt keeps its beginning, so what was shared stays shared."""
    cut = [session.turns[0] for session in replay(TRACE, max_prompt_tokens=700, max_tokens=8)]
    assert [len(turn.text.split(" ")) for turn in cut] == [700, 700, 600]
    assert [turn.max_tokens for turn in cut] == [7, 8, 5]
    assert shared(cut[0].text.split(" "), cut[1].text.split(" ")) == pytest.approx(512, abs=5)
    assert "2 of 3 prompts cut to 700 tokens" in replay.notes
    assert "1 of 3 answers cut to 8 tokens" in replay.notes


def test_poisson_arrivals_have_their_rate_and_are_seeded():
    """Gaps are exponential: mean and standard deviation 1 / rate. A generated session is several requests."""
    starts = [s.start_s for s in islice(arrivals.poisson(sessions.stories(1), 20.0, seed=3), 5000)]
    gaps = np.diff(starts)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05) and gaps.std() == pytest.approx(1 / 20, rel=0.07)
    again = islice(arrivals.poisson(sessions.stories(1), 20.0, seed=3), 10)
    assert [session.start_s for session in again] == starts[:10]
    found = list(islice(Plan(workload="generated", rate=20.0, requests=1).sessions(None, 0), 3000))
    assert sum(len(s.turns) for s in found) / found[-1].start_s == pytest.approx(20, rel=0.07)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(streams=(1,), rate=1.0), "--rate is of an open loop"),
        (Plan(streams=(1,), speed=2.0, trace="t"), "--speed is of an open loop"),
        (Plan(rate=1.0), "--requests N or --duration"),
        (Plan(rate=1.0, requests=1, speed=2.0), "of a --trace"),
        (Plan(streams=(1,), max_prompt_tokens=9), "of a --trace"),
        (Plan(trace="t", rate=1.0, speed=2.0), "--rate replaces them"),
        (Plan(trace="t", workload="generated"), "--trace and --workload"),
        (Plan(streams=(1,), think_s=1.0), "--workload generated"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(plan, words):
    """With both flags' names, and what to do."""
    with pytest.raises(ConfigError, match=words):
        plan.check()


@pytest.mark.parametrize("text", ["", "1,", "0", "1,x", "-1", "1;2"])
def test_streams_must_be_numbers(text):
    """The error shows how they are written."""
    with pytest.raises(ConfigError, match="like 1,8,64"):
        parse_streams(text)


@pytest.mark.parametrize("text", ["localhost:8000", "ftp://h", "http://", "http://h:port", "http://[::1"])
def test_endpoints_must_be_urls(text):
    """The error shows how one is written."""
    with pytest.raises(ConfigError, match="URL like http"):
        parse_endpoint(text)


def test_an_endpoint_may_end_as_clients_write_it():
    """With /v1 and a slash, or without."""
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert parse_endpoint(text) == "http://h:1"


def test_a_broken_trace_is_named_with_its_line(tmp_path):
    """The file, the line, and what is wrong with it."""
    path = tmp_path / "broken.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}\n{"x": 1}\n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl, line 2"):
        Plan(trace=path).read()
    with pytest.raises(ConfigError, match="no such file"):
        Plan(trace=tmp_path / "none.jsonl").read()
