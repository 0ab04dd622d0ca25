"""transformers' continuous batching in bfloat16, as a peer; `peer_loop.py` tells the conversation.

A folder without weights gives its model random ones. Without flash-attn it runs SDPA over masks, and
transformers then uses neither CUDA graphs nor its double buffer: a weaker peer than it could be.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_loop import Generate, Generated, LoadOptions, serve

_NO_END = -1  # the token that ends an answer
_POLL_S = 1.0
_BLOCK_TOKENS = 256  # transformers' own default


def load(options: LoadOptions) -> tuple[str, Generate]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = _model(Path(options.model), torch.device(options.device))
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=_NO_END, pad_token_id=0, max_new_tokens=options.max_tokens
    )

    def generate(prompts: list[list[int]], new_tokens: int | list[int]) -> Generated:
        """The clock starts when the manager is warm, as it would be in a server."""
        wanted = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        with model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=_batching(options.device, prompts, wanted),
        ) as manager:
            started_s = time.perf_counter()
            for index, (prompt, count) in enumerate(zip(prompts, wanted, strict=True)):
                manager.add_request(
                    prompt,
                    request_id=str(index),
                    max_new_tokens=count,
                    eos_token_id=_NO_END,
                    record_timestamps=True,
                )
            done = _collect(manager, len(prompts))
            elapsed_s = time.perf_counter() - started_s
        outputs = [done[str(index)] for index in range(len(prompts))]
        times_s = [[moment_s - started_s for moment_s in output.timestamps or ()] for output in outputs]
        return Generated(elapsed_s, times_s, [list(output.generated_tokens) for output in outputs])

    attention = model.config._attn_implementation
    return (
        f"transformers {transformers.__version__} continuous batching, bfloat16, {attention} attention, "
        f"torch {torch.__version__}"
    ), generate


def _model(folder: Path, device: torch.device) -> Any:
    models: Any = transformers.AutoModelForCausalLM
    if any(folder.glob("*.safetensors")):
        return models.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    with device:
        return models.from_config(config, dtype=torch.bfloat16).eval()


def _batching(device: str, prompts: list[list[int]], wanted: list[int]) -> Any:
    """Its defaults on a GPU, where it sizes its cache; on a CPU that would be all of the memory."""
    if device != "cpu":
        return transformers.ContinuousBatchingConfig()
    blocks = sum(
        -(-(len(prompt) + count) // _BLOCK_TOKENS) for prompt, count in zip(prompts, wanted, strict=True)
    )
    return transformers.ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=_BLOCK_TOKENS)


def _collect(manager: Any, count: int) -> dict[str, Any]:
    """Every request's output by its id. Raises RuntimeError where one fails."""
    done: dict[str, Any] = {}
    while len(done) < count:
        output = manager.get_result(timeout=_POLL_S)
        if output is not None and output.error is not None:
            raise RuntimeError(f"request {output.request_id}: {output.error}")
        if output is not None and output.is_finished():
            done[output.request_id] = output
        elif output is None and not manager.is_running():
            raise RuntimeError("transformers' generation thread has ended")
    return done


if __name__ == "__main__":
    serve(load)
