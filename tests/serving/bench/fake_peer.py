"""A peer without a model: token i of a prompt's answer is its last id plus i. Run by path, as peers are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "serving" / "bench" / "engine"))

import peer_loop

EAGER = [-1]  # a prompt that is answered too long
DEADLY = [-2]


def load(options: peer_loop.LoadOptions) -> tuple[str, peer_loop.Generate]:
    if not Path(options.model).exists():
        raise FileNotFoundError(f"no model at {options.model}")

    def generate(prompts: list[list[int]], new_tokens: int) -> peer_loop.Generated:
        print("chatter of a library on stdout")
        if DEADLY in prompts:
            sys.exit("out of cheese")
        new_tokens += EAGER in prompts
        times_s = [[0.1 * i for i in range(1, new_tokens + 1)]] * len(prompts)
        outputs = [[prompt[-1] + i for i in range(1, new_tokens + 1)] for prompt in prompts]
        return peer_loop.Generated(0.1 * new_tokens, times_s, outputs)

    return f"fake, {options.threads} threads", generate


peer_loop.serve(load)
