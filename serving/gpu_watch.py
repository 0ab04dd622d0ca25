"""A node's GPUs as NVML sees them, on the metrics endpoint: what they hold, and which are sick."""

from __future__ import annotations

import asyncio
import logging

import pynvml

from cluster.telemetry import GpuReading, NoGpu, read_gpus
from serving import metrics
from serving.metrics import Meter

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


async def watch_gpus(meter: Meter, region: str, node: str) -> None:
    """Record every GPU of this node until cancelled. A node without one says so once, and rests."""
    while True:
        readings = await asyncio.to_thread(read_gpus, pynvml)
        if isinstance(readings, NoGpu):
            logger.info("no GPU on this node: %s", readings.reason)
            await asyncio.Event().wait()
        else:
            for gpu in readings:
                record_gpu(meter, gpu, {"region": region, "node": node, "gpu": str(gpu.index)})
        await asyncio.sleep(INTERVAL_S)


def record_gpu(meter: Meter, gpu: GpuReading, tags: dict[str, str]) -> None:
    """What the GPU tells of itself; a figure it does not tell leaves its gauge alone."""
    figures = {
        metrics.GPU_BUSY: gpu.busy_ratio,
        metrics.GPU_MEMORY_USED: gpu.memory_used_bytes,
        metrics.GPU_MEMORY_TOTAL: gpu.memory_total_bytes,
        metrics.GPU_TEMPERATURE: gpu.temperature_c,
        metrics.GPU_POWER: gpu.power_w,
        metrics.GPU_ECC_UNCORRECTED: gpu.ecc_uncorrected,
        metrics.GPU_SICK: float(gpu.is_sick),
    }
    for series, value in figures.items():
        if value is not None:
            meter.set(series, value, tags)
