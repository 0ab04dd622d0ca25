"""With a GPU, what the interpreter would test is tested there."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU, the tests of its kernels are `gpu` tests."""
    for item in items:
        is_kernels = item.path.parent == HERE and item.path.name.startswith("test_gpu_")
        if torch.cuda.is_available() and is_kernels:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """Where a kernel's tensors live: on the GPU if there is one, else where the interpreter reads them."""
    return "cuda" if torch.cuda.is_available() else "cpu"
