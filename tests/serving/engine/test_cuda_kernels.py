"""The CUDA runner on the Triton kernels: interpreted without a GPU, and on one."""

import pytest
import torch
import torch.distributed as dist

from kernels.dispatch import forced
from serving.engine.cuda_runner import CudaRunner
from serving.engine.executor import ExecutorOptions
from serving.engine.model_runner import allocate_kv_cache
from serving.engine.worker import Worker
from serving.model_spec import read_model_spec
from serving.models.layers import Shard
from tests.serving.engine.cuda_fakes import LazyDevice
from tests.serving.engine.pipelined_lines import (
    BLOCK_TOKENS,
    CPU,
    LIMITS,
    NUM_BLOCKS,
    PROMPTS,
    alone,
    lines_of,
    load,
    run_pipelined,
)
from tests.serving.models.tiny_llama import save_tiny_llama

WIDE = dict(  # heads as wide as the kernels know them
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU; tensors here are the CPU's"
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_gpu_kernels_give_the_plain_runners_tokens(tmp_path, temperature):
    """Prompts that join decodes in one eager step, a prompt of one token, and decodes padded
    to a bucket: worklists in the graphs' fixed buffers give what the plain runner gives."""
    save_tiny_llama(tmp_path, **WIDE)
    model = load(tmp_path, torch.float32)
    prompts = [PROMPTS[at] for at in (0, 4, 3, 2, 1)]
    lines = lines_of(prompts, [10, 8, 8, 3, 3], temperature)
    expected = [alone(model, line) for line in lines]
    device = LazyDevice()
    cache = allocate_kv_cache(model, NUM_BLOCKS + 1, BLOCK_TOKENS, model.dtype, CPU).fill_(float("nan"))
    with forced("triton"):
        runner = CudaRunner(model, cache, LIMITS, device)
        run_pipelined(runner, {0: lines[:1], 2: lines[1:3], 6: lines[3:]})
    assert [line.tokens for line in lines] == expected
    # One sequence alone; two prompts join, and three decode as four; two more join, and five decode as six.
    assert {bucket.rows for bucket in runner._graphs} == {1, 4, 6}
    assert (device.seen["eager"], device.seen["replay"]) == (5, 5)
    others = {*range(NUM_BLOCKS)} - {block for line in lines for block in line.blocks}
    assert cache[:, :, sorted(others)].isnan().all(), "padding wrote to a block of the pool"


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_gpus_graphs_give_its_eager_tokens(tmp_path, temperature):
    """On a GPU: replays, launched ahead or not, draw what the same steps draw without any graph, while
    sequences join and end. (Other batches would round otherwise: cuBLAS has a kernel for each shape.)"""
    worker = gpu_worker(tmp_path)
    runs = []
    for has_graphs, patient in ((True, False), (True, True), (False, False)):
        lines = lines_of(PROMPTS, [40, 9, 25, 1, 30, 12], temperature)
        worker._runner._graphs = {} if has_graphs else _Forgetful()
        arrivals = {0: lines[:2], 1: lines[2:3], 7: lines[3:]}
        run_pipelined(worker._runner, arrivals, patient=patient)
        captured = [graph for graph in worker._runner._graphs.values() if graph._graph is not None]
        assert len(captured) >= 3 if has_graphs else not captured
        runs.append([line.tokens for line in lines])
    assert runs[0] == runs[1] == runs[2]
    assert all(token >= 0 for tokens in runs[0] for token in tokens)


@pytest.mark.gpu
def test_nccls_collectives_are_replayed_with_their_graph(tmp_path):
    """At world size 1, where a sum and a broadcast change nothing: captured, they do not."""
    worker = gpu_worker(tmp_path)
    runner = worker._runner
    expected = lines_of(PROMPTS[:3], [20, 9, 14], temperature=0.8)
    run_pipelined(runner, {0: expected[:2], 5: expected[2:]})
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in runner._model._layers:
            for part in (layer.attention.out, layer.mlp.down):
                object.__setattr__(part, "shard", Shard(0, 1, dist.all_reduce))
        runner._share = lambda drawn: dist.broadcast(drawn, 0)
        runner._graphs.clear()
        lines = lines_of(PROMPTS[:3], [20, 9, 14], temperature=0.8)
        run_pipelined(runner, {0: lines[:2], 5: lines[2:]})
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
    assert any(graph._graph is not None for graph in runner._graphs.values())
    assert [line.tokens for line in lines] == [line.tokens for line in expected]


class _Forgetful(dict):
    """Every bucket is new to it: all steps are first ones, which run eagerly."""

    def get(self, key, default=None):
        return default

    def setdefault(self, key, default=None):
        return default


def gpu_worker(folder) -> Worker:
    save_tiny_llama(
        folder, **(WIDE | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))
    )
    return Worker(
        ExecutorOptions(
            weights=tuple(folder.glob("*.safetensors")),
            spec=read_model_spec(folder),
            dtype="float16",
            device="cuda",
            block_tokens=BLOCK_TOKENS,
            kv_blocks=NUM_BLOCKS,
            max_num_seqs=LIMITS.max_num_seqs,
        )
    )
