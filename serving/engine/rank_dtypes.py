"""What a rank's dtype options come to in tensors, and which of them its device and model do not have.

dtype     CPU                        GPU: weights, activations     kernels
int8      kernels.cpu, or float32    W8A16, bfloat16               kernels.quantized_linear
int4      -                          W4A16, bfloat16               the layers' matrices alone:
float8    -                          e4m3 a row, e4m3 a token      embeddings and head are bfloat16
"""

from __future__ import annotations

import torch

from kernels.linear import WeightFormat
from kernels.quantized_linear import GROUP
from serving.engine.executor import ExecutorOptions
from serving.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}
_FORMATS: dict[str, WeightFormat] = {"int8": "int8", "int4": "int4", "float8": "float8"}
_E4M3_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16  # what cuBLASLt asks of e4m3 operands
# A value of a matrix that is widened for a step of many rows: its copies on the way, at most.
_WIDENED_BYTES = {"int8": 8, "int4": 12}


def weight_format(options: ExecutorOptions) -> WeightFormat:
    """How torch's and Triton's kernels find the layers' matrices."""
    return "plain" if options.device == "cpu" else _FORMATS.get(options.dtype, "plain")


def widening_bytes(options: ExecutorOptions) -> int:
    """Memory for the widest matrix of a layer while a step of many rows multiplies with it."""
    spec = options.spec
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    values = spec.hidden_size * max(heads, 2 * spec.intermediate_size) // options.world_size
    return values * _WIDENED_BYTES.get(weight_format(options), 0)


def check_dtypes(options: ExecutorOptions) -> None:
    """Raises ConfigError, naming the key and a way out, where the options cannot be had."""
    if options.device == "cpu":
        if options.dtype in ("int4", "float8"):
            raise ConfigError(f"model.dtype: {options.dtype} needs engine.device cuda; a CPU has int8")
        return
    check_format(options, weight_format(options))
    capability = torch.cuda.get_device_capability(options.device)
    for key, value in (("model.dtype", options.dtype), ("engine.kv_dtype", options.kv_dtype)):
        if value.startswith("float8") and capability < _E4M3_CAPABILITY:
            raise ConfigError(
                f"{key}: {value} needs a GPU of compute capability 8.9 or more; this one has "
                f"{capability[0]}.{capability[1]}: leave {key} out"
            )


def check_format(options: ExecutorOptions, weights: WeightFormat) -> None:
    """Raises ConfigError where the model's matrices, split so, cannot be kept in this format."""
    spec, ranks = options.spec, options.world_size
    if weights != "plain" and spec.experts is not None:
        raise ConfigError(f"model.dtype: {weights} is not for experts; take bfloat16 or float16")
    inputs = (spec.hidden_size, spec.num_heads * spec.head_dim // ranks, spec.intermediate_size // ranks)
    if weights == "int4" and any(width % GROUP for width in inputs):
        raise ConfigError(
            f"model.dtype: int4 needs inputs in multiples of {GROUP}; a rank's matrices have "
            f"{', '.join(map(str, inputs))}: take int8, or other engine.tensor_parallel than {ranks}"
        )
    if weights == "float8" and any(width % _FP8_MULTIPLE for width in inputs):
        raise ConfigError(
            f"model.dtype: float8 needs inputs in multiples of {_FP8_MULTIPLE}; a rank's matrices have "
            f"{', '.join(map(str, inputs))}: take int8"
        )
