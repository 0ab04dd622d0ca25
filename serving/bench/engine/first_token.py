"""`python -m serving.bench.engine.first_token STARTED_S SETUP`: a process that ends with its first tokens.

Prints one JSON object: seconds of each stage since `STARTED_S`, the clock when its parent started it. So
the interpreter's start and all imports are in it. `SETUP` is an `EngineSetup` as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest
from serving.messages import StepFrame

PROMPT_TOKENS = 32
NEW_TOKENS = 3  # the third comes from a graph, if there are any


def main(started_s: float, setup: EngineSetup) -> dict[str, float]:
    """Seconds of each stage, in their order; "after the first token" is what the others took."""
    stages: dict[str, float] = {}
    last_s = started_s

    def ended(stage: str) -> None:
        nonlocal last_s
        now_s = time.time()
        stages[stage] = now_s - last_s
        last_s = now_s

    ended("interpreter and imports")
    torch.zeros(1, device=setup.device)
    ended("device")
    with EngineUnderTest(setup) as under_test:
        ended("weights and KV pool")
        firsts: list[float] = []

        def seen(frame: StepFrame) -> None:
            if frame.deltas and not firsts:
                firsts.append(time.time())
                ended("first token")

        under_test.run([BenchRequest(tuple(range(PROMPT_TOKENS)), NEW_TOKENS)], seen)
        ended("after the first token")
    return stages


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), EngineSetup(**json.loads(sys.argv[2])))), flush=True)
