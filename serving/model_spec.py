"""The shape of a model, read from its `config.json`. Torch-free: every process may know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from serving.errors import ModelFileError

Count = TypeVar("Count", int, float)

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
# Of a configuration that does not say (transformers' configuration classes).
_MISTRAL_WINDOW = 4096
_QWEN3_WINDOW, _QWEN3_FULL_LAYERS = 4096, 28


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary scaling. `kind` is "linear" or "llama3"; the other fields are llama3's."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts, in each layer's MLP's place: every token goes to `per_token` of `count`."""

    count: int
    per_token: int
    intermediate_size: int  # of one
    renormalize: bool  # whether a token's shares are made to sum to 1

    def touched(self, tokens: float) -> float:
        """How many of them so many tokens go to, were each choice as likely: E (1 - (1 - k/E)^n)."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


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
    windows: tuple[int | None, ...] = ()  # positions each layer sees up to a token's own; () where all do
    experts: Experts | None = None

    def window(self, layer: int) -> int | None:
        """How many positions a token sees in this layer, its own included; None for all."""
        return self.windows[layer] if self.windows else None

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values one token keeps, over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the layers' matrices, embeddings and head not included."""
        return self._linear_parameters(self.experts.count if self.experts else 0)

    @property
    def num_active_parameters(self) -> int:
        """Those of them that one token is multiplied with."""
        return self._linear_parameters(self.experts.per_token if self.experts else 0)

    def num_touched_parameters(self, tokens: float) -> float:
        """Those of them that a step of so many tokens reads; of experts, what is to be expected."""
        return self._linear_parameters(self.experts.touched(tokens) if self.experts else 0)

    @property
    def mlp_width(self) -> int:
        """Values a token has between the matrices of an MLP, or of its experts'."""
        if self.experts is None:
            return self.intermediate_size
        return self.experts.per_token * self.experts.intermediate_size

    def tensor_parallel_sizes(self) -> list[int]:
        """The rank counts this model splits over: divisors common to its heads, KV heads and MLP."""
        smallest = min(self.num_heads, self.num_kv_heads)
        mlp = self.experts.intermediate_size if self.experts else self.intermediate_size
        dims = (self.num_heads, self.num_kv_heads, mlp)
        return [n for n in range(1, smallest + 1) if all(dim % n == 0 for dim in dims)]

    def _linear_parameters(self, experts: Count) -> Count:
        """Of all layers, with so many of each layer's experts where it has some."""
        d = self.hidden_size
        attention = d * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.experts is None:
            return self.num_layers * (attention + 3 * d * self.intermediate_size)
        router = d * self.experts.count
        return self.num_layers * (attention + router + 3 * d * self.experts.intermediate_size * experts)


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
        head_dim=_head_dim(config),
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context_tokens=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        windows=_windows(config),
        experts=_experts(config),
    )


def _head_dim(config: dict[str, Any]) -> int:
    if config["architectures"][0] == "Qwen3ForCausalLM":  # not what one would guess without it
        return config["head_dim"]
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window, as transformers' model of this architecture has it; () where none has one."""
    architecture, num_layers = config["architectures"][0], config["num_hidden_layers"]
    window, num_full = None, num_layers  # that many layers, the first ones, see all
    if architecture == "MistralForCausalLM":
        window, num_full = config.get("sliding_window", _MISTRAL_WINDOW), 0
    elif config.get("use_sliding_window"):
        window = config.get("sliding_window", _QWEN3_WINDOW)
        num_full = min(config.get("max_window_layers", _QWEN3_FULL_LAYERS), num_layers)
        if architecture != "Qwen3ForCausalLM":
            raise ModelFileError(f"config.json: use_sliding_window with {architecture} is not supported")
    windows = (None,) * num_full + (window,) * (num_layers - num_full)
    kinds = config.get("layer_types")
    if kinds is not None:
        given = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        known = set(kinds) <= {"full_attention", *(["sliding_attention"] if window else [])}
        if not known or len(kinds) != num_layers or (given != windows and architecture != "Qwen3ForCausalLM"):
            raise ModelFileError(
                f"config.json: layer_types: not supported so with {architecture} and a sliding_window of "
                f"{window}"
            )
        windows = given
    return windows if any(windows) else ()


def _experts(config: dict[str, Any]) -> Experts | None:
    if config["architectures"][0] != "Qwen3MoeForCausalLM":
        return None
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ModelFileError(
            "config.json: mlp_only_layers, decoder_sparse_step: layers without experts are not supported"
        )
    return Experts(
        count=config.get("num_experts") or config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        renormalize=bool(config.get("norm_topk_prob", False)),
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
