"""Stand-ins for calibrated replicas: engines without a model in threads, and a process that dies."""

import asyncio
import multiprocessing
import sys
import threading
from contextlib import asynccontextmanager


def dies(connection, payload):
    """A replica's process that cannot load its model."""
    sys.exit(3)


@asynccontextmanager
async def in_threads(options, **milliseconds):
    """Engines whose steps only wait, each in a thread of its own."""
    # Here, so that a process which only dies imports nothing of this.
    from serving.bench.router.calibration_fleet import PipedReplicas

    connections, threads = {}, []
    for option in options:
        ours, theirs = multiprocessing.Pipe()
        connections[option.name] = ours
        threads.append(threading.Thread(target=_serve, args=(theirs, option, milliseconds)))
        threads[-1].start()
    replicas = PipedReplicas(connections)
    try:
        await replicas.ready()
        yield replicas
    finally:
        replicas.close()
        for thread in threads:
            await asyncio.to_thread(thread.join)


def _serve(connection, option, milliseconds):
    from serving.bench.router.calibration_replica import ModelFacts, Replica
    from serving.bench.router.reference_fleet import QWEN3_32B
    from serving.config import MockEngineConfig
    from serving.engine.executor import ExecutorOptions
    from serving.engine.mock_executor import MockExecutor

    config = MockEngineConfig(**milliseconds)
    executor = MockExecutor(
        ExecutorOptions(weights=(), spec=QWEN3_32B, kv_blocks=option.num_blocks, mock=config)
    )
    facts = ModelFacts(
        name="mock",
        weight_version="1",
        kv_dtype="bfloat16",
        vocab_size=50_000,
        context_tokens=8192,
        stop_token_id=2,
    )
    asyncio.run(Replica(option, executor, QWEN3_32B, facts).serve(connection))
