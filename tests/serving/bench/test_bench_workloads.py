"""The workloads of a GPU's engine, their floors, and the figures made of their runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serving.bench.engine.capture_clock import CaptureClock
from serving.bench.engine.floors import phase_floor, steps_floor_s
from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest
from serving.bench.engine.peers import Peer, PeerSpec
from serving.bench.engine.startup import save_random
from serving.bench.engine.timeline import timeline_of, union
from serving.bench.engine.workload_figures import WorkloadRun, workload_figures
from serving.bench.engine.workload_runs import measure_workload, run_workload
from serving.bench.engine.workload_session import MODELS, config_folder
from serving.bench.engine.workloads import KINDS, REHEARSAL, Scale, Workload, nano_requests, workloads
from serving.engine.machine import Machine
from serving.engine.step_time import StepShape, step_bytes, step_flops
from serving.errors import ConfigError
from serving.messages import StepStats
from serving.model_spec import ModelSpec, _from_config, read_model_spec
from serving.models.random_weights import RandomSource
from serving.models.weights import open_weights

H100 = Machine(flops_per_s=798e12, bytes_per_s=3.0e12)  # as measured on one
TINY = MODELS / "tiny"


def spec_of(name: str) -> ModelSpec:
    """Of any architecture, served or not."""
    return _from_config(json.loads((MODELS / name / "config.json").read_text()), None)


def stats(step_ms: float, prefill_tokens: int, bytes_moved: float, flops: float = 0.0) -> StepStats:
    fields = {name: 0 for name in StepStats.__struct_fields__} | {"bound": "memory", "schedule_ms": 0.1}
    given = {
        "step_ms": step_ms,
        "prefill_tokens": prefill_tokens,
        "bytes_moved": bytes_moved,
        "flops": flops,
    }
    return StepStats(**(fields | given))


def test_the_batch_is_nano_vllms():
    """256 requests of 100-1,024 tokens each way: its 142,827 tokens in and 133,966 out."""
    batch = Workload("batch", "batch", nano_requests())
    assert (batch.tokens_in, batch.tokens_out) == (142_827, 133_966)
    assert all(100 <= length <= 1024 for lengths in batch.lengths for length in lengths)


@pytest.mark.parametrize(("name", "published"), [("qwen3-0.6b", 25_800), ("llama-3-8b", 10_400)])
def test_the_floor_is_the_published_one(name, published):
    """Tokens/s out of nano-vllm's workload at an H100's measured rates, computed elsewhere, within 3 %."""
    batch = Workload("batch", "batch", nano_requests())
    floor = phase_floor(spec_of(name), H100, batch.lengths)
    assert batch.tokens_out / floor.total_s == pytest.approx(published, rel=0.03)


def test_phases_are_a_prefill_and_a_step_a_token():
    """Two prompts of 5 and 7 that draw 1 and 3 tokens: one step of both, then two of the second alone."""
    spec = spec_of("tiny")

    def ms(shape: StepShape) -> float:
        return H100.floor_ms(step_flops(spec, shape), step_bytes(spec, shape, 2, 2))

    floor = phase_floor(spec, H100, [(5, 1), (7, 3)])
    assert floor.prefill_s * 1e3 == pytest.approx(ms(StepShape(12, 12, 2, (25 + 49) / 2)))
    decodes = ms(StepShape(1, 8, 1, 8)) + ms(StepShape(1, 9, 1, 9))
    assert floor.decode_s * 1e3 == pytest.approx(decodes)


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir()))
def test_workloads_fit_the_model(name):
    """No sequence outgrows a context or a batch the engine is made for; blocks are not shared."""
    spec = spec_of(name)
    for scale in (Scale(), REHEARSAL):
        for workload in workloads(spec, KINDS, scale):
            assert len(workload.requests) <= scale.max_num_seqs
            assert max(map(sum, workload.lengths)) <= spec.context_tokens
            assert max(max(request.token_ids) for request in workload.requests) < spec.vocab_size
            starts = {request.token_ids[:16] for request in workload.requests}
            assert len(starts) == len(workload.requests)


def test_configs_are_found_by_name_and_by_path(tmp_path):
    """A path to a config.json is one, too; anything else is told the names there are."""
    assert config_folder("llama-3-8b") == MODELS / "llama-3-8b"
    (tmp_path / "config.json").write_text("{}")
    assert config_folder(str(tmp_path / "config.json")) == tmp_path
    with pytest.raises(ConfigError, match=r"one of llama-3-8b, qwen3-0\.6b"):
        config_folder("llama-9")


def test_overlapping_work_is_counted_once():
    """Intervals that touch, hide in one another or come unordered cover what they cover."""
    assert union([(4, 5), (0, 2), (1, 3), (1, 2)]) == 4
    assert union([]) == 0


def test_idle_is_what_no_kernel_covers():
    """Two streams busy for 6 of 10 µs leave 40 %; the longest kernel is told first."""
    events = [
        {"name": "b", "ts": 100.0, "dur": 2.0},
        {"name": "a", "ts": 101.0, "dur": 3.0},
        {"name": "a", "ts": 108.0, "dur": 2.0},
    ]
    found = timeline_of(events, steps=2)
    assert found.idle_share == pytest.approx(0.4)
    assert found.busy_ms_per_step == pytest.approx(0.003)
    assert found.kernels == (("a", pytest.approx(5 / 7)), ("b", pytest.approx(2 / 7)))
    assert timeline_of([], steps=2) is None


def test_decoding_begins_after_the_last_prefill():
    """Figures of a decode workload are of the steps behind it: their wall time, and their bytes."""
    machine = Machine(flops_per_s=1e12, bytes_per_s=1e9)
    steps = ((1.0, stats(1000, 8, 5e8)), (1.5, stats(500, 0, 1e8)), (1.75, stats(250, 0, 1e8)))
    run = WorkloadRun(1.75, (1.0,), steps)
    workload = Workload("d", "decode", (BenchRequest((1,) * 8, 3),))
    timeline = timeline_of([{"name": "k", "ts": 0.0, "dur": 3e5}, {"name": "k", "ts": 4e5, "dur": 0.0}], 1)
    found = workload_figures(workload, spec_of("tiny"), machine, 9.0, [run], timeline, 2.0)
    assert (found.steps, found.step_ms) == (2, pytest.approx(375))
    assert found.bandwidth_share == found.step_floor_share == pytest.approx(0.2 / 0.75)
    assert found.traced_idle_share == pytest.approx(0.25)
    assert found.untraced_idle_share == pytest.approx(1 - 300 / 375)
    assert found.tokens_per_s == pytest.approx(3 / 1.75)
    assert steps_floor_s(machine, [step for _, step in steps]) == pytest.approx(0.7)


def test_random_weights_depend_on_name_and_seed_alone():
    """A rank's part is a cut of the whole; another name, another tensor; a row's length is about 1."""
    source, again, other = (RandomSource(seed, torch.float32, torch.device("cpu")) for seed in (0, 0, 1))
    whole = source.tensor("a", (64, 400))
    source.tensor("b", (3, 3))
    assert torch.equal(again.tensor("a", (64, 400), slice(8, 16), slice(0, 100)), whole[8:16, :100])
    assert not torch.equal(other.tensor("a", (64, 400)), whole)
    assert not torch.equal(source.tensor("b", (64, 400)), whole)
    assert whole.norm(dim=1).mean() == pytest.approx(1, rel=0.02)
    assert torch.equal(source.tensor("norm", (5,)), torch.ones(5))


@pytest.fixture(scope="module")
def random_tiny():
    setup = EngineSetup(
        str(TINY), "bfloat16", random_weights=True, threads=1, kv_blocks=200,
        max_num_seqs=REHEARSAL.max_num_seqs, max_step_tokens=REHEARSAL.max_step_tokens,
    )  # fmt: skip
    with EngineUnderTest(setup) as under_test:
        yield under_test


def test_a_workload_is_measured(random_tiny):
    """The engine on random weights gives every token, and a trace of its steps."""
    for workload in workloads(random_tiny.spec, ("decode",), REHEARSAL):
        found = measure_workload(random_tiny, workload, H100, repeats=1, traced_steps=4)
        assert found.steps == REHEARSAL.decode_new - 1
        assert found.timeline.steps == 4 and 0 < found.traced_idle_share < 1
        assert 0 < found.step_floor_share < 1


def test_nothing_is_cached_between_runs(random_tiny):
    """A prompt that has been prefilled is prefilled again."""
    (workload, *_) = workloads(random_tiny.spec, ("prefill",), REHEARSAL)
    for _ in range(2):
        run = run_workload(random_tiny, workload)
        assert sum(step.prefill_tokens for _, step in run.steps) == workload.tokens_in


def test_saved_weights_are_the_drawn_ones(tmp_path):
    """What a start loads from files is what a random start draws; a complete folder is left alone."""
    save_random(TINY, tmp_path / "weights", "cpu")
    spec = read_model_spec(tmp_path / "weights")
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    stored = open_weights(tuple(files), spec, torch.bfloat16)
    drawn = RandomSource(0, torch.bfloat16, torch.device("cpu"))
    name, shape = "model.layers.1.mlp.down_proj.weight", (128, 256)
    assert torch.equal(stored.tensor(name, shape), drawn.tensor(name, shape))
    before = [file.stat().st_mtime_ns for file in files]
    save_random(TINY, tmp_path / "weights", "cpu")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_captures_are_timed():
    """The runner's device is what it was, and every capture has left its seconds."""

    class Device:
        def capture(self, work):
            return work

        def mark(self):
            return "marked"

    class Runner:
        _device = Device()

    runner = Runner()
    clock = CaptureClock(runner)
    assert runner._device.capture(len) is len and runner._device.mark() == "marked"
    assert len(clock.captures_s) == 1 and clock.captures_s[0] >= 0


@pytest.mark.full
def test_transformers_batches_continuously():
    """The peer gives each prompt as many tokens as were asked for, with random weights of a config."""
    spec = PeerSpec.named("transformers-batching", sys.executable)
    peer = Peer(spec, TINY, threads=1, max_batch=2, max_tokens=16)
    try:
        output = peer.generate([[1, 2, 3], [4, 5, 6, 7]], [5, 2])
        assert [len(ids) for ids in output.output_ids] == [5, 2]
        assert [len(times) for times in output.token_times_s] == [5, 2]
        assert 0 < output.token_times_s[0][0] <= output.elapsed_s
    finally:
        peer.close()


def test_the_engine_is_measured_without_ray():
    """Only the programs that need Ray say so; the engine's is there in a process that cannot import it."""
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "import runpy\n"
        "sys.argv = ['serving.bench', *sys.argv[1:]]\n"
        "runpy.run_module('serving.bench', run_name='__main__')\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, *arguments]
        root = Path(__file__).parents[3]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)

    assert "--model-config" in run("engine", "--help").stdout
    refused = run("gateway")
    assert refused.returncode == 1 and "gateway needs ray, which is not installed" in refused.stderr
