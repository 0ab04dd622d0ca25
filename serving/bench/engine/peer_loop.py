"""The conversation of a peer's process with the benchmark: one JSON object a line, over stdin and stdout.

    in   {"model": PATH, "threads": N, "max_batch": B, "max_tokens": T,      once
          "device": "cpu" or "cuda"}
    out  {"description": "what runs, with versions"}
    in   {"prompts": [[id, ...], ...], "new_tokens": N or [N, ...]}          as often as wanted
    out  {"elapsed_s": S, "token_times_s": [[s, ...], ...], "output_ids": [[id, ...], ...]}

A list of numbers, one a prompt, is sent only to a peer that takes them. Peers are run by path in
environments of their own, so this file and they use nothing of Searoom's.
Whatever a library prints to stdout goes to stderr: the benchmark reads lines, not chatter.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoadOptions:
    model: str
    threads: int
    max_batch: int
    max_tokens: int  # prompt and new ones, of one sequence
    device: str = "cpu"


@dataclass(frozen=True)
class Generated:
    """Greedy outputs, and the seconds from the start at which each of a sequence's tokens was known."""

    elapsed_s: float
    token_times_s: list[list[float]]
    output_ids: list[list[int]]


Generate = Callable[[list[list[int]], Any], Generated]


def serve(load: Callable[[LoadOptions], tuple[str, Generate]]) -> None:
    """Answer requests until stdin ends. A failure ends the process with its traceback on stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    description, generate = load(LoadOptions(**json.loads(sys.stdin.readline())))
    print(json.dumps({"description": description}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        generated = generate(request["prompts"], request["new_tokens"])
        print(json.dumps(asdict(generated)), file=replies, flush=True)
