"""The shape of a model, read from its `config.json`. Torch-free: every process may know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from serving.errors import ModelFileError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary scaling. `kind` is "linear" or "llama3"; the other fields are llama3's."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions and constants of one decoder-only model."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_tokens: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values one token keeps, over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the layers' matrices, embeddings and head not included."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def tensor_parallel_sizes(self) -> list[int]:
        """The rank counts this model splits over: divisors common to its heads, KV heads and MLP."""
        smallest = min(self.num_heads, self.num_kv_heads)
        dims = (self.num_heads, self.num_kv_heads, self.intermediate_size)
        return [n for n in range(1, smallest + 1) if all(dim % n == 0 for dim in dims)]


def read_model_spec(folder: Path) -> ModelSpec:
    """The spec in `folder/config.json` (with eos ids of `generation_config.json`, where there is one).

    Raises ModelFileError naming the file when it is missing, not JSON, or an unknown architecture.
    """
    path = folder / "config.json"
    config = _read_json(path)
    architectures = config.get("architectures") or ["?"]
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise ModelFileError(
            f"{path}: architecture {architectures[0]} is not supported; "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    generation = folder / "generation_config.json"
    eos = (_read_json(generation) if generation.exists() else {}).get("eos_token_id")
    try:
        return _from_config(config, eos if eos is not None else config.get("eos_token_id"))
    except KeyError as missing:
        raise ModelFileError(f"{path}: the key {missing} is missing") from missing


def _from_config(config: dict[str, Any], eos: int | list[int] | None) -> ModelSpec:
    num_heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return ModelSpec(
        architecture=config["architectures"][0],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context_tokens=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ModelFileError(f"config.json: rope type {kind!r} is not supported; supported: linear, llama3")
    known = {
        key: rope[key]
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if key in rope
    }
    return RopeScaling(kind=kind, factor=float(rope["factor"]), **known)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as missing:
        raise ModelFileError(f"{path} is missing: a model folder needs it beside its weights") from missing
    except json.JSONDecodeError as broken:
        raise ModelFileError(f"{path} is not valid JSON: {broken}") from broken
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return content
