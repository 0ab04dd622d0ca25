"""GPU readings as gauges."""

from cluster.telemetry import GpuReading
from serving import metrics
from serving.gpu_watch import record_gpu
from serving.metrics import MemoryMeter

TAGS = {"region": "eu", "node": "10.0.0.1", "gpu": "3"}


def test_what_a_gpu_tells_is_set_and_what_it_does_not_tell_is_left_alone():
    """None is no zero: a gauge nobody fed stays untouched."""
    meter = MemoryMeter()
    record_gpu(meter, GpuReading(index=3, memory_used_bytes=5, power_w=70.5), TAGS)
    assert meter.value(metrics.GPU_MEMORY_USED, **TAGS) == 5
    assert meter.value(metrics.GPU_POWER, **TAGS) == 70.5
    told = {name for name, _ in meter.values}
    assert told == {metrics.GPU_MEMORY_USED.name, metrics.GPU_POWER.name, metrics.GPU_SICK.name}


def test_a_sick_gpu_shows():
    """1 when the driver cannot reach it, or asks for recovery."""
    meter = MemoryMeter()
    record_gpu(meter, GpuReading(index=3, unreadable="lost"), TAGS)
    assert meter.value(metrics.GPU_SICK, **TAGS) == 1
