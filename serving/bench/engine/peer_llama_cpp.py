"""llama.cpp on the GGUF as it is, as a peer; `peer_loop.py` tells the conversation.

Several sequences decode as one `llama_batch`, the way llama.cpp's own server does it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import llama_cpp
import numpy as np
from peer_loop import Generate, Generated, LoadOptions, serve

CELL_ROUNDING = 256  # llama.cpp pads a sequence's part of the cache to so many tokens


class _Context:
    """A llama.cpp context with room for `num_seqs` sequences of `max_tokens` each."""

    def __init__(self, model: object, num_seqs: int, max_tokens: int, threads: int) -> None:
        cells = -(-max_tokens // CELL_ROUNDING) * CELL_ROUNDING * num_seqs
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = cells
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp has no room for {num_seqs} sequences of {max_tokens} tokens")
        self._batch = llama_cpp.llama_batch_init(cells, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(self, tokens: Sequence[Sequence[int]], start: int) -> list[int]:
        """Run `tokens` of every sequence from position `start`; the greedy next token of each."""
        batch = self._batch
        batch.n_tokens = 0
        last_rows = []
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                row = batch.n_tokens
                batch.token[row] = token
                batch.pos[row] = start + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = offset == len(ids) - 1
                batch.n_tokens += 1
            last_rows.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return [self._best(row) for row in last_rows]

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


def load(options: LoadOptions) -> tuple[str, Generate]:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        options.model.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise FileNotFoundError(f"llama.cpp cannot load {options.model}")

    def generate(prompts: list[list[int]], new_tokens: int) -> Generated:
        length = len(prompts[0])
        context = _Context(model, len(prompts), length + new_tokens, options.threads)
        times_s: list[float] = []
        steps: list[list[int]] = []
        started_s = time.perf_counter()
        tokens: list[list[int]] = prompts
        for start in (0, *range(length, length + new_tokens - 1)):
            steps.append(context.decode(tokens, start))
            times_s.append(time.perf_counter() - started_s)
            tokens = [[token] for token in steps[-1]]
        elapsed_s = time.perf_counter() - started_s
        context.close()
        return Generated(elapsed_s, [times_s] * len(prompts), [list(ids) for ids in zip(*steps, strict=True)])

    return (
        f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {options.model.rsplit('/', 1)[-1]}",
        generate,
    )


if __name__ == "__main__":
    serve(load)
