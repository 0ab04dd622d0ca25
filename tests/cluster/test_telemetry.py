"""GPU readings, from a fake NVML that fails the way the real one does."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from cluster.telemetry import RECOVERY_ACTIONS, GpuReading, NoGpu, read_gpus


class FakeNvmlError(Exception):
    """Stands for `pynvml.NVMLError`."""


@dataclass
class FakeGpu:
    """An H100 at work. A figure that is None is not supported; `lost` is Xid 79."""

    used_bytes: int | None = 60 << 30
    busy_percent: int | None = 97
    temperature_c: int | None = 61
    milliwatts: int | None = 512_345
    ecc_uncorrected: int | None = 0
    rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    recovery_action: int | None = 0
    lost: bool = False


@dataclass
class FakeNvml:
    """The calls `read_gpus` makes, with NVML's own rules: nothing before init, all pairs closed."""

    gpus: list[FakeGpu] = field(default_factory=list)
    no_library: bool = False
    inits: int = 0
    NVMLError: type[Exception] = FakeNvmlError

    def nvmlInit(self) -> None:
        if self.no_library:
            raise FakeNvmlError("NVML Shared Library Not Found")
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self.inits -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.inits > 0
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].lost:
            raise FakeNvmlError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return f"GPU-{self.gpus.index(gpu)}"

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(used=_supported(gpu.used_bytes), total=80 << 30)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(gpu=_supported(gpu.busy_percent), memory=43)

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return _supported(gpu.temperature_c)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        return _supported(gpu.milliwatts)

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, error: int, counter: int) -> int:
        assert (error, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return _supported(gpu.ecc_uncorrected)

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> tuple[int, int, int, int]:
        return _supported(gpu.rows)

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> list[SimpleNamespace]:
        """As NVML does: the call succeeds, and each field carries its own return code."""
        assert fields == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        supported = gpu.recovery_action is not None
        code = pynvml.NVML_SUCCESS if supported else pynvml.NVML_ERROR_NOT_SUPPORTED
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=gpu.recovery_action or 0))]


def _supported(figure: Any) -> Any:
    if figure is None:
        raise FakeNvmlError("Not Supported")
    return figure


def read(*gpus: FakeGpu) -> list[GpuReading]:
    nvml = FakeNvml(list(gpus))
    readings = read_gpus(nvml)
    assert isinstance(readings, list) and nvml.inits == 0
    return readings


def test_a_machine_without_a_driver_is_an_answer() -> None:
    """The real library, on a machine without one, and the fake one: a reason, not an exception."""
    assert read_gpus(FakeNvml(no_library=True)) == NoGpu(reason="NVML Shared Library Not Found")
    assert read_gpus(FakeNvml()) == NoGpu(reason="the driver sees no GPU")
    assert isinstance(read_gpus(pynvml), (NoGpu, list))


def test_a_reading_is_in_plain_units() -> None:
    """Bytes, ratios of 1, degrees and watts, whatever NVML counts in."""
    (reading,) = read(FakeGpu())
    assert reading == GpuReading(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        uuid="GPU-0",
        memory_used_bytes=60 << 30,
        memory_total_bytes=80 << 30,
        busy_ratio=0.97,
        memory_busy_ratio=0.43,
        temperature_c=61,
        power_w=512.345,
        ecc_uncorrected=0,
        rows_remapped=0,
        remap_pending=False,
        remap_failed=False,
        recovery_action=0,
    )
    assert not reading.is_sick


def test_what_a_gpu_does_not_tell_is_none_and_no_sickness() -> None:
    """An old card knows neither rows nor recovery; the figures beside the missing ones stay."""
    (reading,) = read(FakeGpu(ecc_uncorrected=None, rows=None, recovery_action=None, milliwatts=None))
    untold = (reading.ecc_uncorrected, reading.rows_remapped, reading.recovery_action, reading.power_w)
    assert untold == (None, None, None, None)
    assert reading.temperature_c == 61 and not reading.is_sick


def test_a_lost_gpu_is_a_sick_reading_beside_the_healthy() -> None:
    """One GPU off the bus hides none of the others."""
    lost, healthy = read(FakeGpu(lost=True), FakeGpu())
    assert lost.is_sick and "GPU is lost" in (lost.sickness or "")
    assert healthy.index == 1 and not healthy.is_sick


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (FakeGpu(rows=(0, 8, 0, 1)), "service"),
        (FakeGpu(recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET), "drain and reset"),
        (FakeGpu(recovery_action=99), "number 99"),
        (FakeGpu(rows=(0, 1, 1, 0), ecc_uncorrected=1), None),
    ],
)
def test_sickness_is_what_the_driver_cannot_mend_by_itself(gpu: FakeGpu, why: str | None) -> None:
    """A failed remap or an asked-for recovery is sick; a pending remap waits for the next idle reset."""
    (reading,) = read(gpu)
    assert reading.is_sick == (why is not None)
    assert (why or "") in (reading.sickness or "")


def test_recovery_actions_are_nvmls() -> None:
    """Our names stand at NVML's own numbers, the first and the last of them included."""
    numbers = [value for name, value in vars(pynvml).items() if name.startswith("NVML_GPU_RECOVERY_ACTION_")]
    assert sorted(numbers) == list(range(len(RECOVERY_ACTIONS)))
    assert RECOVERY_ACTIONS[pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT] == "node reboot"
    assert RECOVERY_ACTIONS[pynvml.NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT] == "system reboot"
