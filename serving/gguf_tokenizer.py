"""Child process: write tokenizer.json and tokenizer_config.json of a GGUF file.

    python -m serving.gguf_tokenizer FILE.gguf FOLDER

The only module that imports transformers, whose import takes seconds: it runs once a file, never
on the serving path. Exits 1 with one line on stderr when the tokenizer is of an unknown kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

# Each names how text was split before its merges were learned (llama.cpp: src/llama-vocab.cpp).
# transformers knows some of these names and takes any other for gpt-2, silently: the tokens would
# be almost right. So the split is set here, and an unknown name is refused.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])


def _words_with_digits(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words, runs of signs and of spaces, and so many digits at a time."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _words_with_digits(r"\p{N}{1,3}")
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _words_with_digits(r"\p{N}"),
}
_COMPOSED = {"qwen2"}  # text is brought into Unicode's form NFC before
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # a word in the vocabulary skips its merges


def convert(file: Path, folder: Path) -> None:
    """Write the tokenizer of `file` to `folder`; ValueError when its kind or split is not known."""
    fields = gguf.GGUFReader(file).fields
    kind = fields["tokenizer.ggml.model"].contents() if "tokenizer.ggml.model" in fields else "none"
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; supported are: gpt2, llama")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    if kind == "gpt2":
        split = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "gpt-2"
        _set_split(tokenizer.backend_tokenizer, split)
    tokenizer.chat_template = None  # written apart, as the file spells it
    tokenizer.save_pretrained(folder)


def _set_split(backend: Tokenizer, split: str) -> None:
    if split not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre {split!r} is not supported; supported are: {', '.join(_SPLITS)}"
        )
    backend.pre_tokenizer = _SPLITS[split]
    if split in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = split in _WHOLE_WORDS_FIRST


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, KeyError, IndexError, OSError) as error:
        sys.exit(str(error))
