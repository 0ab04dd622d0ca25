"""Model architectures, one file each. A new one is a file and a line here."""

from serving.models.llama import Llama

ARCHITECTURES = {"LlamaForCausalLM": Llama}
