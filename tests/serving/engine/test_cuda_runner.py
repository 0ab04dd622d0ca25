"""Decoding from graphs, on a device that does a GPU's work on CPU tensors, with torch's attention."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from serving.engine.cuda_runner import CudaRunner, Pending
from serving.engine.model_runner import allocate_kv_cache
from serving.engine.plan import SamplingBatch, StepPlan
from serving.model_spec import read_model_spec
from serving.models.layers import Shard
from serving.models.llama import Llama
from serving.models.weights import open_weights
from tests.serving.engine.cuda_fakes import LazyDevice, live_attention
from tests.serving.engine.harness import request
from tests.serving.engine.pipelined_lines import (
    BLOCK_TOKENS,
    CPU,
    LIMITS,
    NUM_BLOCKS,
    PROMPTS,
    Plain,
    alone,
    lines_of,
    load,
    run_pipelined,
)
from tests.serving.engine.step_plans import Span, generate, greedy, step_plan
from tests.serving.engine.test_engine import collect, make_engine
from tests.serving.models.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return load(folder, torch.float32)


@dataclass
class Rig:
    """A runner over the lazy device, and an executor's face for `generate`."""

    model: Llama
    device: LazyDevice = field(default_factory=LazyDevice)
    num_blocks: int = NUM_BLOCKS
    bytes_per_weight: float = 4.0
    runs_ahead: bool = True
    share: Callable[[torch.Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.cache = allocate_kv_cache(self.model, NUM_BLOCKS + 1, BLOCK_TOKENS, self.model.dtype, CPU)
        self.cache.fill_(float("nan"))
        self.runner = CudaRunner(
            self.model, self.cache, LIMITS, self.device, self.share, live_attention(self.cache[0])
        )

    def launch(self, plan, sampling):
        return self.runner.launch(plan, sampling)

    def check_untouched(self, blocks: set[int]) -> None:
        """Nobody wrote to these."""
        assert self.cache[:, :, sorted(blocks)].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_graphs_give_the_plain_runners_tokens(llama, count):
    """Every batch, padded or not, decodes to what the model runner gives, replay after replay; blocks that
    are not the sequences' own are never written, though the cache and the dummy block begin as NaN."""
    rig = Rig(llama)
    assert generate(rig, PROMPTS[:count], 12, BLOCK_TOKENS) == generate(
        Plain(llama), PROMPTS[:count], 12, BLOCK_TOKENS
    )
    # The prompt alone in the first case is of one token: a decode like the others.
    assert (rig.device.seen["capture"], rig.device.seen["replay"]) == (1, 10 + (count == 1))
    held = [-(-(len(prompt) + 12) // BLOCK_TOKENS) for prompt in PROMPTS[:count]]
    mine = np.random.default_rng(0).permutation(NUM_BLOCKS)[: sum(held)].tolist()
    rig.check_untouched({*range(NUM_BLOCKS)} - {*mine})


def test_a_graph_is_captured_when_it_is_needed_again(llama):
    """Nothing is captured at the start; a bucket's first step is eager, its second captures, and from
    then on there are replays alone. Buckets of other sizes, or that draw otherwise, are others."""
    rig = Rig(llama)
    assert not rig.device.seen
    lines = lines_of(PROMPTS[:3], [1] * 3)

    def decode(count: int, temperature: float) -> Counter:
        spans = [Span([3], len(line.prompt), line.blocks) for line in lines[:count]]
        sampling = replace(greedy(count), temperature=np.full(count, temperature, dtype=np.float32))
        with rig.device.counting() as seen:
            rig.launch(step_plan(spans, BLOCK_TOKENS), sampling).tokens()
        return {name: n for name, n in seen.items() if name in ("eager", "capture", "replay")}

    first, second, later = {"eager": 1}, {"capture": 1, "replay": 1}, {"replay": 1}
    assert [decode(1, 0), decode(1, 0), decode(1, 0)] == [first, second, later]
    assert [decode(3, 0), decode(3, 0), decode(1, 0), decode(3, 0)] == [first, second, later, later]
    assert [decode(3, 1), decode(3, 0), decode(3, 1), decode(3, 1)] == [first, later, second, later]


def test_a_step_costs_one_copy_each_way(llama):
    """Prefill, mixed or decode, eager or replayed: one array goes to the device, one comes back."""
    rig = Rig(llama)
    lines = lines_of(PROMPTS[1:4], [8] * 3)
    run_pipelined(rig.runner, {0: lines[:2], 3: lines[2:]})
    steps = rig.device.seen["eager"] + rig.device.seen["replay"]
    assert steps == 11
    assert (rig.device.seen["to device"], rig.device.seen["to host"]) == (steps, steps)


def test_a_step_that_draws_nothing_brings_nothing_back(llama):
    """A prompt's middle chunk, and every step of a rank that is not the first."""
    rig = Rig(llama)
    plan = step_plan([Span([1, 2, 3], 0, [0])], BLOCK_TOKENS)
    nothing = replace(plan, logits_rows=plan.logits_rows[:0])
    assert rig.launch(nothing, greedy(0)).tokens().shape == (0,)
    for at in range(3, 6):
        rig.runner.follow(step_plan([Span([1], at, [0])], BLOCK_TOKENS))
    rig.device.finish()
    assert (rig.device.seen["to device"], rig.device.seen["to host"]) == (4, 0)
    assert rig.device.seen["replay"] == 2
    assert rig.cache[:, :, 0, :, :6].isfinite().all()


def test_a_follower_writes_the_leaders_keys(llama):
    """Rank 0 and the others run the same steps, so their caches are the same."""
    leader, follower = Rig(llama), Rig(llama)
    for start in range(8):
        plan = step_plan([Span([start], start, [3]), Span([9], start, [5])], BLOCK_TOKENS)
        leader.launch(plan, greedy(2)).tokens()
        follower.runner.follow(plan)
    follower.device.finish()
    assert torch.equal(leader.cache[:, :, [3, 5], :, :8], follower.cache[:, :, [3, 5], :, :8])


def test_a_follower_reads_what_the_leader_has_drawn(llama):
    """It draws nothing itself: tokens that the plan does not tell come from rank 0, step by step."""
    sent = deque()
    leader = Rig(llama, share=lambda drawn: sent.append(drawn.clone()))
    follower = Rig(llama, share=lambda drawn: drawn.copy_(sent.popleft()))
    (line,) = lines_of(PROMPTS[2:3], [9])
    for _ in range(9):
        plan = step_plan([line.span()], BLOCK_TOKENS)
        leader.launch(plan, greedy(1))
        follower.runner.follow(plan)
        line.num_launched += 1
        leader.device.finish()
        follower.device.finish()
    assert not sent and not line.tokens, "the host has told no token"
    theirs, own = (rig.cache[:, :, line.blocks].transpose(3, 4).flatten(2, 3) for rig in (leader, follower))
    written = len(PROMPTS[2]) + 8
    assert own[:, :, :written].isfinite().all() and own[:, :, written:].isnan().all()
    assert torch.equal(theirs[:, :, :written], own[:, :, :written])
    assert follower.device.seen["to host"] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_may_be_launched_before_the_tokens_of_the_one_before(llama, temperature):
    """Tokens that stay on the device lead to the same text, while sequences join and end in between."""
    rig = Rig(llama)
    lines = lines_of(PROMPTS, [14, 3, 9, 1, 12, 6], temperature)
    arrivals = {0: lines[:2], 1: lines[2:3], 4: lines[3:5], 6: lines[5:]}
    expected = [alone(llama, line) for line in lines]
    run_pipelined(rig.runner, arrivals)
    assert [line.tokens for line in lines] == expected
    assert rig.device.seen["replay"] > 4


def test_tokens_are_waited_for_one_step_at_a_time(llama):
    """Asking for a step's tokens does that step's work and not the next one's; tokens asked for late, when
    their memory serves other steps, are still their own."""
    rig = Rig(llama)
    (line,) = lines_of(PROMPTS[2:3], [9])
    expected = alone(llama, line)
    pendings = []
    for number in range(9):
        plan = step_plan([line.span()], BLOCK_TOKENS)
        pendings.append(rig.runner.launch(plan, greedy(1)))
        line.num_launched += 1
        if number == 1:
            assert pendings[0].tokens().tolist() == expected[:1]
            assert len(rig.device._queue) == 3, "copy, forward, copy of the second step"
    assert [int(pending.tokens()[0]) for pending in pendings] == expected


def test_rows_that_want_no_token_are_left_out(llama):
    """Of a step of single tokens, some the middle of a prompt, only the wanted rows' tokens come."""
    rig, plain = Rig(llama), Plain(llama)
    spans = [Span([token], 0, [token]) for token in (4, 5, 6)]
    plan = step_plan(spans, BLOCK_TOKENS)
    wanted = replace(plan, logits_rows=plan.logits_rows[[0, 2]])
    expected = plain.launch(wanted, greedy(2)).tokens().tolist()
    assert [rig.launch(wanted, greedy(2)).tokens().tolist() for _ in range(3)] == [expected] * 3


def test_a_row_that_is_not_finite_harms_nobody(llama):
    """It draws -1; the step that was launched upon that runs, and its neighbours' text is theirs."""
    rig = Rig(llama)
    broken, sound = lines_of(PROMPTS[3:5], [6, 6])
    expected = alone(llama, sound)
    sound.place = 1
    seen = []
    for number in range(6):
        plan = step_plan([broken.span(), sound.span()], BLOCK_TOKENS)
        if number == 2:
            rig.device.finish()
            rig.cache[0, 0, broken.blocks[0], :, 3] = float("nan")
        seen.append(rig.runner.launch(plan, greedy(2)))
        broken.num_launched += 1
        sound.num_launched += 1
    assert [pending.tokens()[1] for pending in seen] == expected
    assert [pending.tokens()[0] for pending in seen[2:]] == [-1] * 4


def test_an_engine_that_runs_ahead_tells_what_one_that_waits_tells(llama):
    """Chunks, decodes, stop tokens, a pool too small for all: the same tokens for everyone, and steps were
    replayed and launched ahead."""
    rig, plain = Rig(llama), Plain(llama)
    stop = expected = None
    for executor in (plain, plain, rig):
        requests = [
            request(str(i), tuple(prompt), max_tokens=9 + i, seed=i, stop_token_ids=stop or ())
            for i, prompt in enumerate(PROMPTS)
        ]
        engine = make_engine(num_blocks=12, block_tokens=BLOCK_TOKENS, executor=executor, max_num_seqs=6)
        engine.submit(requests)
        frames = []
        while (frame := engine.step()) is not None:
            frames.append(frame)
        outputs, ends = collect(frames)
        engine.check_integrity()
        if stop is None:
            stop = tuple({tokens[4] for tokens in outputs.values()})
        elif expected is None:
            expected = outputs, ends
    assert (outputs, ends) == expected
    assert {"stop"} in [set(reasons) for reasons in ends.values()]
    assert max(frame.stats.batch_size for frame in frames if frame.stats) < len(PROMPTS)
    assert rig.device.seen["replay"] > 3


def test_more_rows_than_can_be_drawn_are_refused(llama):
    """There is memory for one token a sequence, and no more."""
    plan = step_plan([Span([1], 0, [n]) for n in range(7)], BLOCK_TOKENS)
    with pytest.raises(ValueError, match="max_num_seqs is 6"):
        Rig(llama).runner.launch(plan, greedy(7))


def test_two_ranks_run_ahead_as_one(tmp_path):
    """Sums and drawn tokens travel between the ranks within the steps, over gloo here: pipelined over two
    ranks, every line gets what it gets alone on one."""
    save_tiny_llama(tmp_path, num_key_value_heads=2, num_attention_heads=4)
    spec = read_model_spec(tmp_path)
    store = dist.HashStore()
    plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
    lines = lines_of(PROMPTS[:4], [9, 12, 3, 7], temperature=0.7)
    expected = [alone(load(tmp_path, torch.float32), line) for line in lines]

    def runner_of(rank: int) -> CudaRunner:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        shard = Shard(rank, 2, lambda partial: group.allreduce([partial]).wait())
        source = open_weights(tuple(tmp_path.glob("*.safetensors")), spec, torch.float32)
        model = Llama(spec, source, CPU, shard)
        cache = allocate_kv_cache(model, NUM_BLOCKS + 1, BLOCK_TOKENS, model.dtype, CPU).fill_(float("nan"))

        def share(drawn: torch.Tensor) -> None:
            group.broadcast(drawn, 0).wait()

        return CudaRunner(model, cache, LIMITS, LazyDevice(), share, live_attention(cache[0]))

    def follow() -> None:
        follower = runner_of(1)
        while (plan := plans.get()) is not None:
            follower.follow(plan)
            follower._device.finish()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        leader = _Leader(runner_of(0), plans)
        run_pipelined(leader, {0: lines[:3], 4: lines[3:]})
    finally:
        plans.put(None)
        thread.join(60)
    assert [line.tokens for line in lines] == expected


class _Leader:
    """Rank 0: what it launches, the other rank follows."""

    def __init__(self, runner: CudaRunner, plans: queue.SimpleQueue[StepPlan | None]) -> None:
        self._runner, self._plans = runner, plans

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Pending:
        self._plans.put(plan)
        return self._runner.launch(plan, sampling)
