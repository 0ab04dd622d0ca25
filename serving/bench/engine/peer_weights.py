"""The model's weights as every peer wants them: the same bits, as bfloat16 safetensors beside the GGUF."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from serving.model_files import ModelFiles, models_cache
from serving.model_spec import ModelSpec
from serving.models.weights import open_weights


def bfloat16_folder(files: ModelFiles, spec: ModelSpec, cache: Path | None = None) -> Path:
    """A folder transformers and vLLM load: `files` itself, or its GGUF dequantised, made once.

    `cache` replaces the XDG cache folder.
    """
    if files.weights[0].suffix == ".safetensors":
        return files.folder
    folder = (cache or models_cache()) / f"bfloat16-{files.weight_version}"
    if folder.is_dir():  # renamed into place when complete
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        shutil.copytree(files.folder, draft, dirs_exist_ok=True)
        config = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
        source = open_weights(files.weights, spec, torch.bfloat16)
        tensors = {name: source.tensor(name, shape) for name, shape in tensor_shapes(spec).items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """A Llama's or Qwen3's tensors under Hugging Face's names, [out, in] each."""
    d, f = spec.hidden_size, spec.intermediate_size
    queries, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, d)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (d,),
            f"{prefix}.self_attn.q_proj.weight": (queries, d),
            f"{prefix}.self_attn.k_proj.weight": (kv, d),
            f"{prefix}.self_attn.v_proj.weight": (kv, d),
            f"{prefix}.self_attn.o_proj.weight": (d, queries),
            f"{prefix}.post_attention_layernorm.weight": (d,),
            f"{prefix}.mlp.gate_proj.weight": (f, d),
            f"{prefix}.mlp.up_proj.weight": (f, d),
            f"{prefix}.mlp.down_proj.weight": (d, f),
        }
        if spec.architecture == "Qwen3ForCausalLM":
            shapes |= {f"{prefix}.self_attn.{part}_norm.weight": (spec.head_dim,) for part in "qk"}
    return shapes
