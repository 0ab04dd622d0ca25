"""A rank that claims a GPU and computes on the CPU: for placement tests on pretend GPU nodes."""

import os
from dataclasses import replace

from serving.engine.executor import ExecutorOptions
from serving.engine.worker import Worker


class CpuWorker(Worker):
    """Refuses to start unless Ray gave it exactly one GPU."""

    def __init__(self, options: ExecutorOptions) -> None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        assert options.device == "cuda" and len(gpus.split(",")) == 1 and gpus, f"GPUs of this rank: {gpus!r}"
        super().__init__(replace(options, device="cpu", dtype="float32"))
