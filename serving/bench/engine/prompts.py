"""Prompts for benchmarks: plain English, the same at every run, no two alike from their first words on."""

from __future__ import annotations

import random
from itertools import islice, product

from serving.errors import InvalidRequest
from serving.tokenizer import Tokenizer

_TASKS = (
    "Explain {topic} to a ten-year-old.",
    "Write a short story about {topic}.",
    "List five facts about {topic}.",
    "What are the advantages and disadvantages of {topic}?",
    "Write a polite e-mail that asks a colleague about {topic}.",
    "Summarise the history of {topic} in three sentences.",
    "Give me step-by-step advice for somebody new to {topic}.",
    "Write a Python function whose name has to do with {topic}, and explain it.",
    "Compare {topic} with something it is often confused with.",
    "Which question would you ask an expert on {topic}, and why?",
)
_TOPICS = (
    "tides", "bread baking", "prime numbers", "the Roman aqueducts", "bicycles", "photosynthesis",
    "chess openings", "lighthouses", "the water cycle", "public libraries", "solar eclipses", "bees",
    "sailing at night", "compound interest", "volcanoes", "map projections", "learning the piano",
    "vaccines", "railway timetables", "glass making",
)  # fmt: skip
_SUBJECTS = ("The harbour master", "My neighbour", "A young engineer", "The old librarian", "Our teacher")
_VERBS = ("measured", "described", "repaired", "drew", "remembered", "questioned", "photographed")
_OBJECTS = ("the northern pier", "a broken clock", "every second page", "the long bridge", "two small boats")
_ENDS = ("before the rain came", "without a word", "in less than an hour", "for the third time", "by hand")


def instructions(count: int) -> list[str]:
    """The first `count` of 200 different instructions, of all kinds from the start."""
    assert count <= len(_TASKS) * len(_TOPICS)
    shuffled = list(product(_TASKS, _TOPICS))
    random.Random(1).shuffle(shuffled)
    return [task.format(topic=topic) for task, topic in islice(shuffled, count)]


def chat_prompts(tokenizer: Tokenizer, count: int) -> list[tuple[int, ...]]:
    """`instructions` in the model's chat template, or as they are where it has none."""
    return [_chat_ids(tokenizer, text) for text in instructions(count)]


class Windows:
    """An endless supply of prompts of any length; no two share a block, so no prefix cache helps."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def take(self, num_tokens: int) -> tuple[int, ...]:
        """The next prompt, of exactly `num_tokens`."""
        parts = [f"{self._random.randrange(10**9)}:"]
        while True:
            parts += [self._sentence() for _ in range(num_tokens // 8 + 1)]
            token_ids = self._tokenizer.encode(" ".join(parts), add_special=False)
            if len(token_ids) >= num_tokens:
                return tuple(token_ids[:num_tokens])

    def _sentence(self) -> str:
        words = [self._random.choice(kind) for kind in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)]
        return f"{' '.join(words)}."


def _chat_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    try:
        rendered = tokenizer.render_chat([{"role": "user", "content": text}])
    except InvalidRequest:  # no template: a base model
        return tuple(tokenizer.encode(text, add_special=True))
    return tuple(tokenizer.encode(rendered, add_special=False))
