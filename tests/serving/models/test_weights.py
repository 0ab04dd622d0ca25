"""Reading tensors: names, rows and columns, and files that are not what they should be."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from serving.errors import ModelFileError
from serving.model_spec import ModelSpec
from serving.models.gguf_file import GgufFile
from serving.models.weights import GgufSource, open_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD_DIM = 8


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        intermediate_size=64,
        vocab_size=40,
        context_tokens=64,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(),
    )


def llama_cpp_permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What convert_hf_to_gguf does to query and key projections."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.fixture
def gguf_path(tmp_path):
    """A small file, written by the gguf library: text arrays, nested values, four kinds of tensor."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""] * 50)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 7)
    writer.add_name("tiny")
    writer.add_block_count(1)
    random = np.random.default_rng(0)
    query, down, table = (
        random.normal(size=shape).astype(np.float32) for shape in ((32, 32), (32, 64), (40, 32))
    )
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(table, q8), raw_dtype=q8)
    writer.add_tensor("blk.0.attn_q.weight", llama_cpp_permute(query, 4))
    writer.add_tensor("blk.0.ffn_down.weight", down.astype(np.float16))
    writer.add_tensor("output_norm.weight", np.arange(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {Q_PROJ: query, DOWN: down, EMBEDDING: table, "model.norm.weight": np.arange(32.0)}


TOLERANCE = {Q_PROJ: 0, DOWN: 1e-3, EMBEDDING: 2e-2, "model.norm.weight": 0}


@pytest.mark.parametrize("name", TOLERANCE)
def test_gguf_gives_hugging_face_tensors(name, gguf_path, spec):
    """Dequantised, with query rows back in Hugging Face's order; exact where nothing was quantised."""
    path, tensors = gguf_path
    expected = torch.from_numpy(tensors[name]).float()
    found = GgufSource(path, spec, torch.float32).tensor(name, tuple(expected.shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_shard_is_a_slice_of_the_whole(kind, gguf_path, spec, tmp_path):
    """Rows and columns read alone are those of the whole tensor, in any dtype."""
    path, tensors = gguf_path
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({name: torch.from_numpy(np.float32(value)) for name, value in tensors.items()}, path)
    source = open_weights((path,), spec, torch.bfloat16)
    rows, columns = slice(HEAD_DIM, 3 * HEAD_DIM), slice(16, 32)
    whole = source.tensor(Q_PROJ, (32, 32))
    assert whole.dtype == torch.bfloat16
    assert source.tensor(Q_PROJ, (32, 32), rows=rows).equal(whole[rows])
    assert source.tensor(DOWN, (32, 64), columns=columns).equal(source.tensor(DOWN, (32, 64))[:, columns])


def test_directory_equals_the_gguf_librarys(gguf_path):
    """Our directory of a file names the same tensors, kinds, shapes and bytes as gguf's reader."""
    path, _ = gguf_path
    ours = GgufFile(path)
    theirs = gguf.GGUFReader(path)
    assert ours.metadata["general.name"] == "tiny"
    assert ours.metadata["llama.block_count"] == 1
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert (stored.kind, stored.shape) == (tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
        assert ours.read(stored).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_missing_or_misshapen_tensor_is_named(kind, gguf_path, spec, tmp_path):
    """What is missing, or not as large as the config says, is an error that names it and the file."""
    path, tensors = gguf_path
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({DOWN: torch.from_numpy(tensors[DOWN])}, path)
    source = open_weights((path,), spec, torch.float32)
    with pytest.raises(
        ModelFileError, match=r"lm_head\.weight.*missing|missing.*lm_head|lm_head.*is missing"
    ):
        source.tensor("lm_head.weight", (40, 32))
    with pytest.raises(ModelFileError, match=r"down_proj.*\(32, 64\).*\(32, 65\)"):
        source.tensor(DOWN, (32, 65))


def test_any_truncated_gguf_is_refused(gguf_path, spec):
    """Cut anywhere, in its header or its data, a file is refused with a word on what to do."""
    path, _ = gguf_path
    whole = path.read_bytes()
    for size in [0, 3, 4, 20, *range(24, len(whole) - 32, 97), len(whole) - 32]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"model\.gguf.*(fetch the file again|cannot be read)"):
            GgufSource(path, spec, torch.float32)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupt_header_is_refused_or_read(gguf_path, data):
    """Whatever a header's bytes say, reading it ends at once, and at worst in ModelFileError."""
    whole = bytearray(gguf_path[0].read_bytes())
    at = data.draw(st.integers(0, 1600))
    wrong = data.draw(st.binary(min_size=1, max_size=9))
    whole[at : at + len(wrong)] = wrong
    path = gguf_path[0].with_name("corrupt.gguf")
    path.write_bytes(whole)
    try:
        directory = GgufFile(path)
    except ModelFileError as refusal:
        assert "corrupt.gguf" in str(refusal)
        return
    for stored in directory.tensors.values():
        directory.read(stored)


@pytest.mark.parametrize(
    "content",
    [b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack("<IQQ", 9, 0, 0), b"GGUF" + bytes(4096)],
)
def test_what_is_no_gguf_is_refused(content, tmp_path, spec):
    """Other files and unknown versions are refused."""
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"other\.gguf"):
        GgufSource(path, spec, torch.float32)


def test_broken_safetensors_are_refused(tmp_path, spec):
    """A truncated or missing safetensors file, and one of integers, are each refused by name."""
    path = tmp_path / "model.safetensors"
    save_file({DOWN: torch.zeros(32, 64)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"model\.safetensors.*fetch the file again"):
        open_weights((path,), spec, torch.float32)
    with pytest.raises(ModelFileError, match=r"gone\.safetensors"):
        open_weights((tmp_path / "gone.safetensors",), spec, torch.float32)
    save_file({DOWN: torch.zeros(32, 64, dtype=torch.int8)}, path)
    with pytest.raises(ModelFileError, match=r"down_proj.*int8"):
        open_weights((path,), spec, torch.float32).tensor(DOWN, (32, 64))


def test_mixed_or_no_weight_files_are_refused(tmp_path, spec):
    """One GGUF file or safetensors files; anything else is refused."""
    for paths in ((), (tmp_path / "a.gguf", tmp_path / "b.gguf"), (tmp_path / "pytorch_model.bin",)):
        with pytest.raises(ModelFileError, match=r"one \.gguf file or all \.safetensors"):
            open_weights(paths, spec, torch.float32)
