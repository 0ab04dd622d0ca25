"""An executor without a model: it waits as long as a step should take, and emits tokens by rule.

    step    ms = base + per_token · n + per_kv_token · Σ(c + q) + per_logit · S + per_pair · Σ q·(c + q/2)
    token   token_ids[(seed + position) mod len(token_ids)]
    end     the model's end token with probability 1 / mean_output_tokens, by a hash of (seed, position)

with n tokens in the step, q new ones and c context tokens a sequence, S tokens drawn. Scheduler and block
pool are the engine's own, so blocks, prefix matches and preemptions are real; only the maths is not there.
A token depends on its request's seed and its place alone: neither the batch nor the replica changes it.
The lengths that come of it are geometric; a request that ignores the end token runs to its `max_tokens`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from serving.config import MockEngineConfig
from serving.engine.executor import Done, ExecutorOptions
from serving.engine.kv_sizing import DEFAULT_CPU_KV_BYTES
from serving.engine.machine import Machine
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan
from serving.engine.step_time import StepShape, step_flops
from serving.engine.uniform import uniform
from serving.errors import ConfigError

COMMON_TOKENS = range(512, 1536)
"""Ids of common words and parts of words in a byte-pair vocabulary, which begins with the commonest."""

NEVER_LESS_MS = 1e-6
BOUNDLESS_BYTES_PER_S = 1e18

_VALUE_BYTES = 2


class MockExecutor:
    """One rank, which keeps no weights and no keys and values: a pool of any size costs nothing.

    Without `kv_blocks` the pool has as many blocks as the model's would have in `kv_memory_bytes`.
    `sleep` takes seconds.
    """

    bytes_per_weight = float(_VALUE_BYTES)
    runs_ahead = False

    def __init__(self, options: ExecutorOptions, sleep: Callable[[float], None] = time.sleep) -> None:
        assert options.world_size == 1, "the config lets no mock engine have several ranks"
        config = options.mock or MockEngineConfig()
        vocab_size, end_ids = options.spec.vocab_size, options.spec.eos_token_ids
        token_ids = config.token_ids or COMMON_TOKENS[: max(0, vocab_size - COMMON_TOKENS[0])]
        if not token_ids or max(token_ids) >= vocab_size:
            raise ConfigError(f"engine.mock.token_ids: the model's vocabulary ends at {vocab_size - 1}")
        self.kv_dtype = options.kv_cache_dtype
        self.num_blocks = options.kv_blocks or _blocks_in_memory(options)
        self.num_host_blocks = (options.host_kv_bytes or 0) // _block_bytes(options)
        self._spec, self._step = options.spec, config.step
        self._token_ids = np.array(token_ids, dtype=np.int32)
        self._end_id = end_ids[0] if end_ids and config.mean_output_tokens is not None else None
        self._end_share = 1.0 / (config.mean_output_tokens or 1.0)
        self._sleep = sleep

    def measure_machine(self) -> Machine:
        """One on which the model would take the configured times: the Router's first guess is right."""
        token_s = max(self._step.per_token_ms, NEVER_LESS_MS) / 1e3
        token_flops = step_flops(self._spec, StepShape(1, 0, 0, 0))
        return Machine(token_flops / token_s, BOUNDLESS_BYTES_PER_S, self._step.base_ms)

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Done:
        """Returns after the step's milliseconds."""
        started_s = time.perf_counter()
        tokens = self._draw(sampling)
        left_s = started_s + self.step_ms(plan) / 1e3 - time.perf_counter()
        if left_s > 0:
            self._sleep(left_s)
        return Done(tokens)

    def step_ms(self, plan: StepPlan) -> float:
        new_tokens = np.diff(plan.query_start).astype(np.float64)
        pairs = new_tokens @ (plan.context_lens - new_tokens / 2)  # c + q/2, where context_lens is c + q
        return self._step.predict_ms(
            len(plan.token_ids), int(plan.context_lens.sum()), len(plan.logits_rows), float(pairs)
        )

    def sleep(self, copies: BlockCopies) -> None:
        """There is nothing to give back."""

    def wake(self) -> None:
        """Nothing was given back."""

    def keep_alive(self) -> None:
        """There is no other rank to keep in touch with."""

    def close(self) -> None:
        """Nothing to release."""

    def _draw(self, sampling: SamplingBatch) -> NDArray[np.int32]:
        number = sampling.seed + sampling.position.astype(np.uint64)  # wraps, like every uint64
        tokens = self._token_ids[number % np.uint64(len(self._token_ids))]
        if self._end_id is not None:
            tokens[uniform(sampling.seed, sampling.position) < self._end_share] = self._end_id
        return tokens


def _blocks_in_memory(options: ExecutorOptions) -> int:
    memory = options.kv_memory_bytes or DEFAULT_CPU_KV_BYTES
    return max(1, memory // _block_bytes(options))


def _block_bytes(options: ExecutorOptions) -> int:
    return options.spec.kv_bytes_per_token(_VALUE_BYTES) * options.block_tokens
