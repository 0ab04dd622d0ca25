"""Without CUDA, every Triton kernel runs in the interpreter."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

# Triton reads this where a kernel is defined: before anything imports kernels.gpu.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU, the tests of its kernels are `gpu` tests; without one, those marked so by hand skip."""
    for item in items:
        if torch.cuda.is_available():
            if item.path.parent == HERE and item.path.name.startswith("test_gpu_"):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where a kernel's tensors live: on the GPU if there is one, else where the interpreter reads them."""
    return "cuda" if torch.cuda.is_available() else "cpu"
