"""Model architectures, one file each. A new one is a file and a line here."""

from collections.abc import Callable

from serving.models.llama import Llama
from serving.models.qwen3 import load_qwen3
from serving.models.qwen3_moe import load_qwen3_moe

ARCHITECTURES: dict[str, Callable[..., Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen3ForCausalLM": load_qwen3,
    "Qwen3MoeForCausalLM": load_qwen3_moe,
}
