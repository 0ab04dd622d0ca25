"""What a GGUF file says of its model, written as the files a Hugging Face model folder has.

    GGUF metadata             becomes
    llama.*, qwen3.*          config.json
    eos and end-of-turn ids   generation_config.json
    tokenizer.chat_template   chat_template.jinja
    tokenizer.ggml.*          tokenizer.json, tokenizer_config.json   (serving/gguf_tokenizer.py)

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from serving.errors import ModelFileError

_REQUIRED_TENSORS = ("token_embd.weight", "output_norm.weight")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CONVERTER = "serving.gguf_tokenizer"
_CONVERTER_TIMEOUT_S = 300.0


def derive(file: Path, folder: Path) -> None:
    """Write everything but the weights of `file` into `folder`.

    Takes seconds, most of them in a child process that imports transformers. Raises ModelFileError
    when `file` is truncated, not GGUF, of another architecture, or its tokenizer is of an unknown kind.
    """
    reader = _open(file)
    config = _config(file, reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": _eos_token_ids(reader)})
    template = _value(reader, "tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    _convert_tokenizer(file, folder)


def _open(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{file} is truncated, or not a GGUF file ({error}): fetch it again") from error


def _config(file: Path, reader: gguf.GGUFReader) -> dict[str, Any]:
    """config.json in the names serving/model_spec.py reads."""
    architecture = _value(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelFileError(
            f"{file} holds a model of kind {architecture!r}; supported are: {', '.join(_ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    missing = [name for name in _REQUIRED_TENSORS if name not in tensors]
    if missing:
        raise ModelFileError(
            f"{file} lacks the tensor {missing[0]}: it is one part of a split model, or broken"
        )
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ModelFileError(f"{file} carries no tokenizer: use a file with tokenizer.ggml.tokens")
    heads = _required(file, reader, f"{architecture}.attention.head_count")
    hidden = _required(file, reader, f"{architecture}.embedding_length")
    theta = _float(_value(reader, f"{architecture}.rope.freq_base", 10_000.0))
    head_dim = _value(reader, f"{architecture}.attention.key_length") or hidden // heads
    return {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "num_hidden_layers": _required(file, reader, f"{architecture}.block_count"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, f"{architecture}.attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "intermediate_size": _required(file, reader, f"{architecture}.feed_forward_length"),
        "vocab_size": len(tokens.data),
        "max_position_embeddings": _required(file, reader, f"{architecture}.context_length"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, reader, architecture, theta, head_dim),
        "rms_norm_eps": _float(_required(file, reader, f"{architecture}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
    }


def _eos_token_ids(reader: gguf.GGUFReader) -> list[int]:
    """Every token that ends a reply: end of text, end of turn, end of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (_value(reader, f"tokenizer.ggml.{key}") for key in keys)
    return sorted({token for token in ids if token is not None})


def _rope_scaling(
    file: Path, reader: gguf.GGUFReader, architecture: str, theta: float, head_dim: int
) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling"
    kind = _value(reader, f"{prefix}.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _float(_value(reader, f"{prefix}.factor", 1.0))}
    if kind != "none":
        raise ModelFileError(f"{file} uses rope scaling {kind!r}; supported are: none, linear, llama3")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is None:
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, llama3_rope_factors(scaling, theta, head_dim), rtol=1e-3):
        raise ModelFileError(f"{file}: rope_freqs.weight does not follow Llama 3's rule; use its safetensors")
    return scaling


def llama3_rope_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> NDArray[np.float64]:
    """[head_dim / 2] divisors of the rotary frequencies under Llama 3's scaling.

    GGUF stores these numbers instead of the rule's constants, so the rule is recognised by them.
    Formula: Llama 3.1's reference code, `apply_scaling`.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _convert_tokenizer(file: Path, folder: Path) -> None:
    root = str(Path(__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-m", _CONVERTER, str(file), str(folder)]
    try:
        child = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_CONVERTER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelFileError(f"the tokenizer of {file} took over {_CONVERTER_TIMEOUT_S:.0f} s") from error
    if child.returncode != 0:
        why = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise ModelFileError(f"the tokenizer of {file} could not be converted: {why[0]}")


def _required(file: Path, reader: gguf.GGUFReader, key: str) -> Any:
    value = _value(reader, key)
    if value is None:
        raise ModelFileError(f"{file} lacks the metadata key {key}: convert the model again")
    if isinstance(value, list):
        raise ModelFileError(f"{file}: {key} differs from layer to layer, which is not supported")
    return value


def _value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _float(value: float) -> float:
    """The shortest decimal that is `value` in float32, the type GGUF stores: 1e-05, not 9.99e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
