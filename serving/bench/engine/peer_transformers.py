"""transformers' `generate` in bfloat16, as a peer; `peer_loop.py` tells the conversation."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from peer_loop import Generate, Generated, LoadOptions, serve


class _TokenClock(transformers.StoppingCriteria):
    """Stops nothing; it is called once a token, for all sequences at once."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(options: LoadOptions) -> tuple[str, Generate]:
    torch.set_num_threads(options.threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> Generated:
        input_ids = torch.tensor(prompts)
        clock = _TokenClock()
        started_s = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        elapsed_s = time.perf_counter() - started_s
        times_s = [moment_s - started_s for moment_s in clock.times_s]
        return Generated(elapsed_s, [times_s] * len(prompts), output[:, input_ids.shape[1] :].tolist())

    return f"transformers {transformers.__version__} generate, bfloat16, torch {torch.__version__}", generate


if __name__ == "__main__":
    serve(load)
