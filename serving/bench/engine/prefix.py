"""What a cached prefix is worth: time to first token of prompts nine tenths cached beside cold ones."""

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
    """Medians of TTFT in ms; `cached_tokens` is what the engine found in its cache."""

    dtype: str
    prompt_tokens: int
    cached_tokens: int
    cold_ttft_ms: float
    cached_ttft_ms: float

    @property
    def ratio(self) -> float:
        return self.cached_ttft_ms / self.cold_ttft_ms


def run(
    setup: EngineSetup,
    console: Console,
    repeats: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> PrefixResult:
    """Cold and cached prompts in turn, each alone on the engine; prints the verdict."""
    with EngineUnderTest(setup) as under_test:
        windows = Windows(Tokenizer(under_test.files))
        result = measure(under_test, windows.take, PROMPT_TOKENS, repeats, on_progress)
    verdict = Verdict(
        f"{result.dtype}: TTFT of {result.prompt_tokens} tokens, {result.cached_tokens} cached "
        f"({result.cached_ttft_ms:.0f} ms), over cold ({result.cold_ttft_ms:.0f} ms)",
        f"<= {MAX_RATIO}",
        result.ratio,
        result.ratio <= MAX_RATIO,
    )
    print_verdicts([verdict], console)
    return result


def measure(
    under_test: EngineUnderTest,
    take: Callable[[int], tuple[int, ...]],
    prompt_tokens: int,
    repeats: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> PrefixResult:
    """The medians over `repeats` pairs after one that is not counted; `take` gives a new prompt of a length.

    Raises ConfigError where the pool is too small to keep a prompt.
    """
    block_tokens = under_test.setup.block_tokens
    shared = round(CACHED_SHARE * prompt_tokens / block_tokens) * block_tokens
    cold, cached = [], []
    for repeat in range(-1, repeats):
        on_progress(f"prefix cache: pair {repeat + 1} of {repeats}")
        prompt = take(prompt_tokens)
        first = _alone(under_test, prompt)
        second = _alone(under_test, prompt[:shared] + take(prompt_tokens - shared))
        if (first.cached_tokens, second.cached_tokens) != (0, shared):
            raise ConfigError(
                f"{second.cached_tokens} of {shared} tokens were still cached: raise kv_blocks, now "
                f"{under_test.num_blocks}"
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
    )


def _alone(under_test: EngineUnderTest, prompt: tuple[int, ...]) -> RequestRecord:
    return under_test.run([BenchRequest(prompt, max_tokens=1)]).requests[0]
