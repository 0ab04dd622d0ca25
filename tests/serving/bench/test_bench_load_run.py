"""The load generator against a real HTTP server whose answers are scripted."""

import asyncio
import math
import signal
import sys

import pytest
from load_server import REFUSAL, Script, fake_endpoint

from serving.bench.load.client import Target
from serving.bench.load.figures import Slo, figures
from serving.bench.load.progress import Progress
from serving.bench.load.run import Limits, Run
from serving.bench.load.sessions import Session, Turn

SLACK_MS = 60.0  # of a busy machine


def singles(starts_s, max_tokens=3):
    return iter(Session(n, (Turn(f"{n}", max_tokens),), start_s=at) for n, at in enumerate(starts_s))


async def one(script, **target):
    """The record of one request that is answered so."""
    async with fake_endpoint(script) as endpoint:
        run = Run(Target(endpoint.url, "sk-1", "tiny", **target), Limits(1))
        await run.closed_loop(singles([0.0]), 1)
    (record,) = run.records
    return record


async def test_times_are_those_of_the_wire():
    """TTFT, gaps, time a token and end are what the server's pauses were; tokens are what it says."""
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    record = await one(Script([" a", " b", " c"], first_s=0.2, gap_s=0.1, usage=usage))
    assert record.state == "ok"
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 5, 4)
    assert 200 <= record.ttft_ms < 200 + SLACK_MS
    assert len(record.gaps_ms) == 2 and all(70 < gap < 100 + SLACK_MS for gap in record.gaps_ms)
    assert 400 <= record.e2e_ms < 400 + 2 * SLACK_MS
    assert record.tpot_ms == pytest.approx((record.e2e_ms - record.ttft_ms) / 4, abs=1e-6)


async def test_without_usage_a_piece_counts_as_a_token():
    """Servers that send no usage are measured all the same."""
    assert (await one(Script([" a", " b"]))).output_tokens == 2


@pytest.mark.parametrize(
    ("script", "state", "kind", "message"),
    [
        (REFUSAL, "refused", "HTTP 503 server_is_overloaded", "no room"),
        (Script(status=503, body="down"), "failed", "HTTP 503", "down"),
        (Script(status=429, headers={"retry-after": "9"}, body="slow"), "refused", "HTTP 429", "slow"),
        (
            Script(status=400, body={"error": {"code": "bad", "message": "no"}}),
            "failed",
            "HTTP 400 bad",
            "no",
        ),
        (Script(end="cut"), "failed", "broken stream", ""),
        (Script(end="bare"), "failed", "broken stream", "without [DONE]"),
        (Script(end="error"), "failed", "error in the stream replica_lost", "the replica died"),
        (Script([]), "failed", "empty answer", "before any text"),
        (Script(content_type="text/html", body="<p>"), "failed", "no event stream", "text/html"),
    ],
)
async def test_every_failure_has_a_kind(script, state, kind, message):
    """What went wrong is told apart, with the server's own words; only a 503 or 429 that says when to
    come back is a refusal."""
    record = await one(script)
    assert (record.state, record.kind) == (state, kind)
    assert message in record.message
    assert not math.isnan(record.end_s)


async def test_timeouts_tell_where_they_struck():
    """No first token, and no end, are two things."""
    assert (await one(Script(first_s=5), timeout_s=0.2)).kind == "timeout before the first token"
    assert (await one(Script(gap_s=5), timeout_s=0.2)).kind == "timeout in the stream"


async def test_no_server_is_no_connection():
    """A closed port fails each request; it raises nothing."""
    async with fake_endpoint(Script()) as endpoint:
        url = endpoint.url
    run = Run(Target(url, None, "tiny"), Limits(2))
    await run.open_loop(singles([0.0, 0.0]))
    assert [record.kind for record in run.records] == ["no connection"] * 2


async def test_a_retry_makes_a_refusal_good_and_keeps_its_time():
    """The refusals are counted, and the wait they cost is in the TTFT."""
    later = Script(status=503, headers={"retry-after": "1"}, body="")
    async with fake_endpoint(lambda number, body: later if number == 0 else Script()) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny", retries=1), Limits(1))
        await run.closed_loop(singles([0.0]), 1)
    (record,) = run.records
    assert (record.state, record.refusals) == ("ok", 1)
    assert record.ttft_ms >= 1000


async def test_headers_say_who_answered():
    """Region and replica are noted, and nothing where no header names them."""
    there = {"x-searoom-region": "eu", "x-searoom-replica": "r1"}
    async with fake_endpoint(lambda n, _: Script(headers=there if n % 2 else {})) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits(4))
        await run.closed_loop(singles([0.0] * 4), 1)
    (place,) = figures(run.records, run.elapsed_s, None).served
    assert (place.region, place.replica, place.num_requests) == ("eu", "r1", 2)


async def test_an_open_loop_keeps_its_times_whatever_the_answers_do():
    """Answers that take ten gaps delay no request: all come when they are due, and overlap."""
    due = [0.05 * n for n in range(20)]
    async with fake_endpoint(Script(first_s=0.5)) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits())
        await run.open_loop(singles(due))
    came = [at - endpoint.came_s[0] for at in endpoint.came_s]
    assert len(came) == 20
    assert all(abs(at - wished) * 1000 < SLACK_MS for at, wished in zip(came, due, strict=True))
    assert all(record.lateness_ms < SLACK_MS for record in run.records)
    assert run.elapsed_s < 0.95 + 0.5 + SLACK_MS / 1000


async def test_a_late_generator_is_in_the_times_and_owns_up():
    """A request that could not be sent in time has its delay in its TTFT, and in the lateness reported."""

    def slow_to_make():
        yield Session(0, (Turn("0", 3),), start_s=0.0)
        yield Session(1, (Turn("1", 3),), start_s=-0.3)  # was due before it could be made

    async with fake_endpoint(Script()) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits())
        await run.open_loop(slow_to_make())
    late = run.records[1]
    assert late.lateness_ms >= 300 and late.ttft_ms >= late.lateness_ms
    assert figures(run.records, run.elapsed_s, None).lateness_ms.max >= 300


async def test_sessions_send_the_real_answers_back():
    """A turn carries the system prompt, all turns before it and what the model said; think times pass."""
    turns = (Turn("one", 3), Turn("two", 3, think_s=0.2), Turn("three", 3))
    async with fake_endpoint(lambda number, _: Script([f"answer {number}", "."])) as endpoint:
        run = Run(Target(endpoint.url, "sk-1", "tiny"), Limits())
        await run.open_loop(iter([Session(0, turns, system="be kind")]))
    assert endpoint.bodies[2]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 0."},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "answer 1."},
        {"role": "user", "content": "three"},
    ]
    assert run.records[1].due_s - run.records[0].end_s == pytest.approx(0.2, abs=0.01)
    assert endpoint.headers[0]["authorization"] == "Bearer sk-1"


async def test_a_failed_turn_ends_its_session():
    """There is no answer to go on from."""
    async with fake_endpoint(REFUSAL) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits())
        await run.open_loop(iter([Session(0, (Turn("one", 3), Turn("two", 3)))]))
    assert [record.turn for record in run.records] == [0]


async def test_a_closed_loop_has_so_many_in_flight():
    """Never more than its streams, and a next request only after an answer."""
    in_flight, most = 0, 0

    def answer(number, body):
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        asyncio.get_running_loop().call_later(0.05, ended)
        return Script(first_s=0.05)

    def ended():
        nonlocal in_flight
        in_flight -= 1

    async with fake_endpoint(answer) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits(12))
        await run.closed_loop(singles([0.0] * 100), 4)
    assert len(run.records) == 12 and most == 4
    assert run.elapsed_s >= 0.15


async def test_limits_end_a_run():
    """By number, or by time; and what was sent is waited for."""
    async with fake_endpoint(Script(first_s=0.3)) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits(duration_s=0.2))
        await run.open_loop(singles([0.0, 0.1, 0.2, 60.0]))
        assert [record.state for record in run.records] == ["ok", "ok"]
        run = Run(Target(endpoint.url, None, "tiny"), Limits(requests=1))
        await run.open_loop(singles([0.0, 60.0]))
        assert len(run.records) == 1


async def test_a_cancelled_run_gives_what_it_has():
    """Ctrl-C cancels the task: what was answered counts, what was under way is no failure and no miss."""
    async with fake_endpoint(lambda number, _: Script(first_s=30 if number else 0)) as endpoint:
        run = Run(Target(endpoint.url, None, "tiny"), Limits())
        task = asyncio.create_task(run.open_loop(singles([0.0, 0.05, 60.0])))
        await asyncio.sleep(0.3)
        assert "2 sent  1 in flight  1 done" in Progress(run, "x").line()
        task.cancel()
        await task
    assert run.is_interrupted
    found = figures(run.records, run.elapsed_s, Slo(ttft_ms=1000))
    assert (found.num_ok, found.num_unfinished, found.num_failed) == (1, 1, 0)
    assert found.goodput.share == 1.0


async def program(*arguments):
    """The command in a process of its own; without `python -m serving.bench`, whose engine imports torch.

    SIGINT is heard, also where these tests run behind a shell's `&`, which would have it ignored.
    """
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{heard}; import typer; from serving.bench.load.command import load; typer.run(load)"
    return await asyncio.create_subprocess_exec(sys.executable, "-c", run, *arguments, stdout=-1, stderr=-1)


async def test_ctrl_c_prints_what_there_is():
    """The program itself: SIGINT ends it with the run so far."""
    fifth_came = asyncio.Event()

    def answer(number, body):
        if number == 4:
            fifth_came.set()
        return Script(gap_s=0.01)

    async with fake_endpoint(answer) as endpoint:
        process = await program("--endpoint", endpoint.url, "--rate", "20", "--duration", "600")
        await asyncio.wait_for(fifth_came.wait(), 60)
        process.send_signal(signal.SIGINT)
        output, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 130, errors.decode()
    assert "TTFT" in output.decode() and "interrupted" in output.decode()
    assert b"Traceback" not in errors


async def test_nothing_but_refusals_is_an_error():
    """The program says what came back, and how often."""
    async with fake_endpoint(REFUSAL) as endpoint:
        process = await program("--endpoint", endpoint.url, "--rate", "50", "--requests", "3")
        output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "3 refused: HTTP 503 server_is_overloaded: no room" in output.decode()
