"""One region, end to end: real clients, real processes, the real model."""

import asyncio
import concurrent.futures
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from clusters import environment, eventually, title
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

UNKNOWN_MODEL = b'{"model": "nope", "messages": [{"role": "user", "content": "x"}]}'
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_openai_client_gets_an_answer(one_region):
    """The sync client asks at temperature 0 and the answer names Paris; usage adds up."""
    reply = one_region.client().chat.completions.create(
        model=one_region.model, messages=FRANCE, temperature=0, max_tokens=24
    )
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


async def test_the_async_client_streams_the_same_answer(one_region):
    """A stream's pieces join to the unstreamed answer; usage comes in the last chunk when asked for."""
    client = one_region.async_client()
    whole = await client.chat.completions.create(
        model=one_region.model, messages=FRANCE, temperature=0, max_tokens=24
    )
    stream = await client.chat.completions.create(
        model=one_region.model,
        messages=FRANCE,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_sampling_controls_work(one_region):
    """A seed repeats a draw, another seed changes it; top_k 1 is greedy; a stop string is cut out."""
    client = one_region.client()

    def ask(**controls):
        extra = {name: controls.pop(name) for name in ("top_k", "min_p", "ignore_eos") if name in controls}
        reply = client.completions.create(
            model=one_region.model, prompt="Once upon a time", max_tokens=12, extra_body=extra, **controls
        )
        return reply.choices[0].text

    assert ask(seed=7, temperature=1.5) == ask(seed=7, temperature=1.5)
    assert len({ask(seed=seed, temperature=1.5) for seed in range(4)}) > 1
    greedy = ask(temperature=0)
    assert ask(top_k=1, seed=3) == greedy
    word = greedy.split()[2]
    assert word not in ask(temperature=0, stop=word)


def test_ignore_eos_runs_to_the_limit(one_region):
    """With ignore_eos the reply has exactly max_tokens tokens and ends with "length"."""
    reply = one_region.client().chat.completions.create(
        model=one_region.model,
        messages=FRANCE,
        temperature=0,
        max_tokens=40,
        extra_body={"ignore_eos": True},
    )
    assert reply.usage.completion_tokens == 40 and reply.choices[0].finish_reason == "length"


def test_a_repeated_prompt_is_found_in_the_prefix_cache(one_region):
    """The second time, all full blocks of the prompt but what must be computed come from the cache."""
    client = one_region.client()
    messages = [{"role": "user", "content": "Count the words of this sentence. " * 8}]
    for _ in range(2):
        reply = client.chat.completions.create(
            model=one_region.model, messages=messages, temperature=0, max_tokens=2
        )
    cached = reply.usage.prompt_tokens_details.cached_tokens
    assert cached == (reply.usage.prompt_tokens - 1) // 16 * 16


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", UNKNOWN_MODEL, 404, "model_not_found"),
        ("POST", "/v1/chat/completions", b"x" * (5 << 20), 413, "request_too_large"),
        ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/v1/models/nope", b"", 404, "model_not_found"),
    ],
)  # fmt: skip
def test_errors_come_in_the_envelope(one_region, method, path, body, status, code):
    """Whatever is wrong, the body is OpenAI's envelope with all four fields."""
    reply = httpx.request(
        method, one_region.endpoint + path, content=body, headers=one_region.headers, timeout=30
    )
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code


def test_a_field_that_cannot_be_honoured_is_refused_by_name(one_region):
    """Logprobs are not there yet: 400, and the error names the field."""
    with pytest.raises(openai.BadRequestError) as refused:
        one_region.client().chat.completions.create(model=one_region.model, messages=FRANCE, logprobs=True)
    assert refused.value.param == "logprobs"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "Basic x"}])
def test_without_a_known_key_there_is_nothing_but_health(one_region, headers):
    """401 on every route that serves; /health and /ready need no key."""
    for path in ("/v1/models", "/status"):
        reply = httpx.get(one_region.endpoint + path, headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready"):
        assert httpx.get(one_region.endpoint + path, headers=headers).status_code == 200


def test_models_are_listed(one_region):
    """The one model, by list and by id."""
    client = one_region.client()
    assert [model.id for model in client.models.list()] == [one_region.model]
    assert client.models.retrieve(one_region.model).id == one_region.model


def test_a_prompt_larger_than_the_pool_is_refused_for_good(one_region):
    """More tokens than the whole KV pool holds: 400 at once, with the figure, not a wait."""
    with pytest.raises(openai.BadRequestError) as refused:
        one_region.client().completions.create(model=one_region.model, prompt=[5] * 3000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


def test_a_client_that_leaves_frees_its_blocks(one_region):
    """Ten streams are dropped after their first chunk: within a second nothing runs or is reserved."""
    client = one_region.client()
    for _ in range(10):
        stream = client.chat.completions.create(
            model=one_region.model, messages=FRANCE, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()

    def idle():
        (replica,) = one_region.status()["replicas"]
        load = replica["load"]
        return load["num_running"] == 0 and load["num_waiting"] == 0 and load["blocks_reserved"] == 0

    eventually(idle, timeout_s=5)


def test_a_full_kv_pool_makes_requests_wait_never_fail(one_region):
    """20 requests that need more than the pool all finish, in full."""
    client = one_region.client(timeout=300)

    def ask(number):
        reply = client.completions.create(
            model=one_region.model,
            prompt=f"Story number {number}: once upon a time there was",
            max_tokens=150,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return reply.usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == [150] * 20


def test_status_and_chat_commands(one_region):
    """`searoom status` shows the replica and what is needed; `searoom chat` streams an answer."""
    status = one_region.run("status").stdout
    assert "local" in status and "160" in status and "needed" in status
    assert "Paris" in one_region.run("chat", "What is the capital of France?", "--temperature", "0").stdout


def test_a_second_up_is_refused(one_region):
    """One cluster a machine: the second says where the first is and how to end it."""
    refused = one_region.run("up", check=False)
    assert refused.returncode == 1 and "searoom down" in refused.stderr


def test_the_dashboard_shows_the_deployments_and_metrics_carry_our_series(one_region):
    """Ray's Serve page lists all three kinds healthy; the metrics endpoint has our series, no secrets."""
    token = (one_region.state / "searoom" / "ray_token").read_text().strip()
    page = httpx.get(
        f"{one_region.dashboard}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}
    ).json()
    deployments = page["applications"]["searoom"]["deployments"]
    assert {name.split("-")[0] for name in deployments} == {"Ingress", "Router", "ModelReplica"}
    assert {state["status"] for state in deployments.values()} == {"HEALTHY"}
    series = eventually(lambda: scrape(one_region), timeout_s=30, interval_s=1)
    for name in ("searoom_requests", "searoom_ttft_seconds", "searoom_kv_blocks_free"):
        assert name in series
    assert one_region.key not in series


def scrape(up):
    """Ray's metrics of the head node, once our series are in it."""
    token = (up.state / "searoom" / "ray_token").read_text().strip()
    nodes = httpx.get(
        f"{up.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    ).json()
    (node,) = nodes["data"]["summary"]
    port = node["raylet"]["metricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return text if "searoom_requests" in text and "searoom_kv_blocks_free" in text else None


async def test_many_clients_at_once(one_region):
    """Sixteen async streams interleave on one replica; every one is whole and all are equal."""
    client = one_region.async_client()

    async def ask():
        stream = await client.chat.completions.create(
            model=one_region.model, messages=FRANCE, temperature=0, max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(ask() for _ in range(16)))
    assert len(set(answers)) == 1 and "Paris" in answers[0]


def test_logs_carry_request_ids_and_never_prompts_or_keys(one_region):
    """A canary in the prompt is in no log file of the cluster, nor is the key."""
    canary = "xylophone-canary-4711"
    one_region.client().completions.create(model=one_region.model, prompt=canary, max_tokens=1)
    time.sleep(1)
    folders = {
        re.sub(r"/logs/.*", "", path.path) for p in one_region.processes("") for path in p.open_files()
    }
    sessions = [folder for folder in folders if "session_" in folder]
    assert sessions
    for session in sessions:
        for file in Path(session, "logs").rglob("*.*"):
            if file.is_file():
                text = file.read_text(errors="replace")
                assert canary not in text and one_region.key not in text, file


def test_a_request_is_one_trace_within_its_callers(one_region, otlp):
    """Ingress, pick, queue, prefill and decode arrive as spans of the caller's trace, without the prompt."""
    trace_id = secrets.token_hex(16)
    parent = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    one_region.client().completions.create(
        model=one_region.model, prompt="quokka", max_tokens=3, extra_headers=parent
    )

    def spans():
        found = {}
        for body in otlp.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans if span.trace_id.hex() == trace_id}
        return found if len(found) >= 5 else None

    found = eventually(spans, timeout_s=15)
    assert set(found) == {"ingress", "pick", "queue", "prefill", "decode"}
    assert all(found["ingress"].span_id == found[name].parent_span_id for name in set(found) - {"ingress"})
    assert not any(b"quokka" in body for body in otlp.bodies)


def test_no_deployment_does_tensor_work(one_region):
    """Ingress, Router and ModelReplica have neither torch nor transformers in their processes; ranks do."""
    deployments = one_region.processes("ray::ServeReplica")
    assert len(deployments) == 3
    for process in deployments:
        assert "libtorch" not in mapped(process), title(process)
    (rank,) = one_region.processes("ray::Rank")
    assert "libtorch" in mapped(rank)


def mapped(process):
    return Path(f"/proc/{process.pid}/maps").read_text()


def test_the_load_benchmark_measures_a_running_cluster(one_region):
    """`python -m serving.bench load` runs against what `up` runs, and prints a row a concurrency."""
    done = subprocess.run(
        [sys.executable, "-m", "serving.bench", "load", "--streams", "1,4", "--max-tokens", "8"],
        env=environment(one_region.state),
        capture_output=True,
        text=True,
        timeout=60,
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "4"], done.stderr
    assert all(float(figure) > 0 for row in rows for figure in row)
