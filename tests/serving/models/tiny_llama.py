"""Small random models, saved by transformers, to compare ours with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 131


def save_tiny_llama(folder: Path, shard_size: str = "5GB", **changes: object) -> PreTrainedModel:
    """A random model of 2 layers in `folder`; `changes` go over its config. Returns it, in float32."""
    return save_tiny(LlamaConfig, folder, shard_size, **changes)


def save_tiny(
    kind: type[PreTrainedConfig], folder: Path, shard_size: str = "5GB", **changes: object
) -> PreTrainedModel:
    """As `save_tiny_llama`, of another architecture."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,  # wide, so that logits differ clearly
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(settings | changes))).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model
