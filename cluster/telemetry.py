"""What NVML says of this machine's GPUs, and which of them are sick.

`read_gpus(pynvml)` never raises for a machine without a GPU or driver: it says so. A figure that
one GPU or driver does not have is None, and a GPU that cannot be read at all is a reading too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

# Field and values of nvml.h, named here so that an older nvidia-ml-py will do as well.
_FIELD_RECOVERY_ACTION = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
_TEMPERATURE_GPU = 0
_ECC_UNCORRECTED = 1
_ECC_VOLATILE = 0  # since the driver was loaded
_SUCCESS = 0

RECOVERY_ACTIONS = (
    "none",
    "GPU reset",
    "node reboot",
    "drain peers",
    "drain and reset",
    "recover IMEX domain",
    "bus reset",
    "system reboot",
)


class Nvml(Protocol):
    """The part of the module `pynvml` that is used. Every call may raise its `NVMLError`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> Any: ...
    def nvmlShutdown(self) -> Any: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetTotalEccErrors(self, handle: Any, error: int, counter: int, /) -> int: ...
    def nvmlDeviceGetRemappedRows(self, handle: Any, /) -> tuple[int, int, int, int]: ...
    def nvmlDeviceGetFieldValues(self, handle: Any, fields: list[int], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class NoGpu:
    """This machine has no GPU that NVML can see."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One GPU now. None: this GPU, or its driver, does not tell."""

    index: int
    name: str = ""
    uuid: str = ""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    busy_ratio: float | None = None  # of the last sample period, some kernel ran
    memory_busy_ratio: float | None = None  # of it, memory was read or written
    temperature_c: int | None = None
    power_w: float | None = None
    ecc_uncorrected: int | None = None  # since the driver was loaded
    rows_remapped: int | None = None  # for uncorrectable errors, ever
    remap_pending: bool | None = None  # takes effect at the next reset
    remap_failed: bool | None = None
    recovery_action: int | None = None  # index into RECOVERY_ACTIONS
    unreadable: str | None = None  # why, where the driver cannot reach the GPU

    @property
    def sickness(self) -> str | None:
        """Why no replica should be on this GPU; None where one may.

        Counted errors and a pending remap are not sickness: the row is out of use, and the reset can
        wait until the GPU is idle.
        """
        if self.unreadable is not None:
            return f"the driver cannot reach it: {self.unreadable}"
        if self.remap_failed:
            return "a row could not be remapped: the GPU needs service"
        if self.recovery_action:
            known = self.recovery_action < len(RECOVERY_ACTIONS)
            action = RECOVERY_ACTIONS[self.recovery_action] if known else f"number {self.recovery_action}"
            return f"the driver asks for recovery: {action}"
        return None

    @property
    def is_sick(self) -> bool:
        return self.sickness is not None


def read_gpus(nvml: Nvml) -> list[GpuReading] | NoGpu:
    """A reading of every GPU, in NVML's order. Pass the module `pynvml`."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NoGpu(reason=str(error))
    try:
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            return NoGpu(reason="the driver sees no GPU")
        return [_read_gpu(nvml, index) for index in range(count)]
    except nvml.NVMLError as error:
        return NoGpu(reason=str(error))
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Nvml, index: int) -> GpuReading:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError as error:
        return GpuReading(index=index, unreadable=str(error))

    memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    busy = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    milliwatts = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    rows = _told(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    return GpuReading(
        index=index,
        name=name,
        uuid=uuid,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        busy_ratio=None if busy is None else busy.gpu / 100,
        memory_busy_ratio=None if busy is None else busy.memory / 100,
        temperature_c=_told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_GPU)),
        power_w=None if milliwatts is None else milliwatts / 1000,
        ecc_uncorrected=_told(
            nvml, lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, _ECC_UNCORRECTED, _ECC_VOLATILE)
        ),
        rows_remapped=None if rows is None else rows[1],
        remap_pending=None if rows is None else bool(rows[2]),
        remap_failed=None if rows is None else bool(rows[3]),
        recovery_action=_told(nvml, lambda: _recovery_action(nvml, handle)),
    )


def _recovery_action(nvml: Nvml, handle: Any) -> int | None:
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [_FIELD_RECOVERY_ACTION])
    return int(field.value.uiVal) if field.nvmlReturn == _SUCCESS else None


Figure = TypeVar("Figure")


def _told(nvml: Nvml, read: Callable[[], Figure]) -> Figure | None:
    """The figure, or None where this GPU or driver does not have it."""
    try:
        return read()
    except nvml.NVMLError:
        return None
