"""What a cached prefix is worth: time to first token of prompts nine tenths cached beside cold ones.

Where the setup has host memory for blocks, the same once more with the prefix evicted to it before.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from rich.console import Console

from serving.bench.engine.figures import percentile
from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest, RequestRecord
from serving.bench.engine.prompts import Windows
from serving.bench.engine.report import Verdict
from serving.bench.engine.tables import print_verdicts
from serving.errors import ConfigError
from serving.tokenizer import Tokenizer

PROMPT_TOKENS = 1024
CACHED_SHARE = 0.9
MAX_RATIO = 0.25


class PrefixResult(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of TTFT in ms; `cached_tokens` is what the engine found in its cache, in host memory or not."""

    dtype: str
    prompt_tokens: int
    cached_tokens: int
    cold_ttft_ms: float
    cached_ttft_ms: float
    is_in_host_memory: bool = False

    @property
    def ratio(self) -> float:
        return self.cached_ttft_ms / self.cold_ttft_ms


def run(
    setup: EngineSetup,
    console: Console,
    repeats: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[PrefixResult]:
    """Cold and cached prompts in turn, each alone on the engine; prints the verdicts."""
    with EngineUnderTest(setup) as under_test:
        windows = Windows(Tokenizer(under_test.files))
        results = [measure(under_test, windows.take, PROMPT_TOKENS, repeats, on_progress)]
        if under_test.worker.num_host_blocks:
            # Room for one prompt at a time: whatever comes evicts what was there.
            under_test.rebuild(num_blocks=-(-PROMPT_TOKENS // setup.block_tokens) + 1)
            results.append(measure(under_test, windows.take, PROMPT_TOKENS, repeats, on_progress))
    print_verdicts([_verdict(result) for result in results], console)
    return results


def _verdict(result: PrefixResult) -> Verdict:
    where = ", in host memory" if result.is_in_host_memory else ""
    return Verdict(
        f"{result.dtype}: TTFT of {result.prompt_tokens} tokens, {result.cached_tokens} cached{where} "
        f"({result.cached_ttft_ms:.1f} ms), over cold ({result.cold_ttft_ms:.1f} ms)",
        f"<= {MAX_RATIO}",
        result.ratio,
        result.ratio <= MAX_RATIO,
    )


def measure(
    under_test: EngineUnderTest,
    take: Callable[[int], tuple[int, ...]],
    prompt_tokens: int,
    repeats: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> PrefixResult:
    """The medians over `repeats` pairs after one that is not counted; `take` gives a new prompt of a length.

    In a pool that keeps less than two prompts, another prompt between the two of a pair evicts the first to
    host memory. Raises ConfigError where what was computed is not cached any more.
    """
    block_tokens = under_test.setup.block_tokens
    shared = round(CACHED_SHARE * prompt_tokens / block_tokens) * block_tokens
    is_evicted = under_test.num_blocks < 2 * prompt_tokens // block_tokens
    cold, cached = [], []
    for repeat in range(-1, repeats):
        on_progress(f"prefix cache: pair {repeat + 1} of {repeats}")
        prompt = take(prompt_tokens)
        first = _alone(under_test, prompt)
        if is_evicted:
            _alone(under_test, take(prompt_tokens))
        second = _alone(under_test, prompt[:shared] + take(prompt_tokens - shared))
        if (first.cached_tokens, second.cached_tokens) != (0, shared):
            raise ConfigError(
                f"{second.cached_tokens} of {shared} tokens were still cached: raise kv_blocks, now "
                f"{under_test.num_blocks}, or host_kv_bytes"
            )
        if repeat >= 0:
            cold.append(first.first_token_s - first.submitted_s)
            cached.append(second.first_token_s - second.submitted_s)
    return PrefixResult(
        dtype=under_test.dtype,
        prompt_tokens=prompt_tokens,
        cached_tokens=shared,
        cold_ttft_ms=percentile(cold, 50) * 1e3,
        cached_ttft_ms=percentile(cached, 50) * 1e3,
        is_in_host_memory=is_evicted,
    )


def _alone(under_test: EngineUnderTest, prompt: tuple[int, ...]) -> RequestRecord:
    return under_test.run([BenchRequest(prompt, max_tokens=1)]).requests[0]
