"""What is asked: sessions of turns, as text.

    stories      one turn each, no two prompts alike, every answer equally long
    generated    several turns each behind a system prompt that other sessions have too
    replayed     a recorded trace: one turn a request, as long as recorded, sharing what it shared

All but `stories` are drawn from a seed: the same seed gives the same texts, another one gives texts
that no earlier run has left in a prefix cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from serving.bench.router.traces import MOONCAKE_BLOCK_TOKENS
from serving.simulator import SimRequest

_SYSTEM_PROMPTS = 8
_SYSTEM_WORDS = (64, 384)  # evenly between
_QUESTION_WORDS = (30.0, 0.8, 150)  # log-normal: median, sigma, most
_ANSWER_TOKENS = (60.0, 0.7, 160)
_MAX_TURNS = 5
_NEXT_TURN = 0.7  # probability that a turn has one after it
# The longest conversation is 384 + 5 * (150 + 160) tokens and the template's: it fits into 2,048.

MEAN_TURNS = sum(_NEXT_TURN**turn for turn in range(_MAX_TURNS))
"""Expected turns of a generated session: a turn is reached with probability `_NEXT_TURN ** turn`."""

# Common words, because with a space before it each is one token in nearly every vocabulary.
_COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education foot boy age policy music market "
    "sense nation plan college interest death experience effect use class control field development"
)
_WORDS = _COMMON_WORDS.split()


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the user, sent `think_s` after the answer before it."""

    text: str
    max_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow each other, each with all before it and the model's own answers."""

    number: int
    turns: tuple[Turn, ...]
    system: str = ""
    start_s: float = 0.0  # of its first turn, in an open loop


def stories(max_tokens: int) -> Iterator[Session]:
    """Endless. The number stands first, so that no two prompts share a block."""
    for number in count():
        yield Session(number, (Turn(f"{number} is my number. Tell me a story.", max_tokens),))


def generated(seed: int, think_s: float, max_tokens: int | None = None) -> Iterator[Session]:
    """Endless. System prompt i is as frequent as 1/i; `think_s` is the mean of an exponential.

    `max_tokens` caps the answers' lengths.
    """
    rng = random.Random(seed)
    systems = [f"{seed}.{i} {words(rng, rng.randint(*_SYSTEM_WORDS))}" for i in range(_SYSTEM_PROMPTS)]
    frequency = [1 / (i + 1) for i in range(_SYSTEM_PROMPTS)]
    for number in count():
        turns: list[Turn] = []
        while True:
            text = f"{number}.{len(turns)} {words(rng, _lognormal(rng, *_QUESTION_WORDS))}"
            tokens = _lognormal(rng, *_ANSWER_TOKENS)
            think = rng.expovariate(1 / think_s) if think_s and turns else 0.0
            turns.append(Turn(text, min(tokens, max_tokens or tokens), think))
            if len(turns) == _MAX_TURNS or rng.random() >= _NEXT_TURN:
                break
        (system,) = rng.choices(systems, frequency)
        yield Session(number, tuple(turns), system)


def replayed(
    requests: Sequence[SimRequest],
    seed: int,
    *,
    max_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
) -> Iterator[Session]:
    """The requests of a trace, read with blocks of MOONCAKE_BLOCK_TOKENS, at the times it has.

    A block's text is drawn from its hash, so equal prefixes are equal text; a word is about a token.
    A recorded prompt contains the answers of the turns before it, so nothing is sent back here. The
    limits cap lengths; a prompt that is cut keeps its beginning.
    """
    for number, request in enumerate(requests):
        tokens = min(request.prompt_tokens, max_prompt_tokens or request.prompt_tokens)
        shared = request.block_hashes[: tokens // MOONCAKE_BLOCK_TOKENS]
        parts = [_named_words(f"{seed}:{name.hex()}", MOONCAKE_BLOCK_TOKENS) for name in shared]
        rest = tokens - MOONCAKE_BLOCK_TOKENS * len(parts)
        if rest:
            parts.append(_named_words(f"{seed}:{request.number}", rest))
        answer = min(request.output_tokens, max_tokens or request.output_tokens)
        yield Session(number, (Turn(" ".join(parts), answer),), start_s=request.arrival_s)


def words(rng: random.Random, number: int) -> str:
    """So many words, with a space between: about as many tokens."""
    return " ".join(rng.choices(_WORDS, k=number))


def _named_words(name: str, number: int) -> str:
    """Always the same words for a name."""
    return words(random.Random(name), number)


def _lognormal(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), sigma))))
