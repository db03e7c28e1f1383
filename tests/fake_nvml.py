"""A stand-in of `pynvml` and of one GPU behind it: the functions, constants and errors that we use, by their names."""

from __future__ import annotations

from types import SimpleNamespace

HANDLE = object()


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value

    def __str__(self) -> str:
        return {3: "Not Supported", 10: "Timeout", 15: "GPU is lost", 16: "GPU requires restart"}[self.value]


class FakeNvml:
    """Set `xids`, `ecc`, `rows`, `recovery` or `error` to what the GPU shall tell; None: it does not tell."""

    NVMLError = NVMLError
    NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_TIMEOUT = 0, 3, 10
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = 15, 16
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    NVML_GPU_RECOVERY_ACTION_NONE, NVML_GPU_RECOVERY_ACTION_GPU_RESET, NVML_GPU_RECOVERY_ACTION_NODE_REBOOT = 0, 1, 2
    NVML_GPU_RECOVERY_ACTION_DRAIN_P2P, NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET = 3, 4
    NVML_GPU_RECOVERY_ACTION_GPU_RESET_BUS = 5
    nvmlEventTypeXidCriticalError = 8

    def __init__(self) -> None:
        self.xids: list[int] = []
        self.ecc: int | None = 0
        self.rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)  # corrected, uncorrected, pending, failed
        self.recovery: int | None = 0
        self.error: int | None = None
        self.has_events = True
        self.open_sets = 0

    def _check(self, told: object = True) -> None:
        if self.error is not None:
            raise NVMLError(self.error)
        if told is None:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetSupportedEventTypes(self, handle: object) -> int:
        assert handle is HANDLE
        self._check()
        return 0b11001 if self.has_events else 0

    def nvmlEventSetCreate(self) -> object:
        self.open_sets += 1
        return self

    def nvmlDeviceRegisterEvents(self, handle: object, types: int, events: object) -> None:
        assert handle is HANDLE and types == self.nvmlEventTypeXidCriticalError and events is self
        self._check()

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> SimpleNamespace:
        assert events is self and timeout_ms >= 0
        self._check()
        if not self.xids:
            raise NVMLError(self.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventType=self.nvmlEventTypeXidCriticalError, eventData=self.xids.pop(0))

    def nvmlEventSetFree(self, events: object) -> None:
        assert events is self
        self.open_sets -= 1

    def nvmlDeviceGetTotalEccErrors(self, handle: object, kind: int, since: int) -> int:
        assert (handle, kind, since) == (HANDLE, self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.NVML_VOLATILE_ECC)
        self._check(self.ecc)
        return int(self.ecc or 0)

    def nvmlDeviceGetRemappedRows(self, handle: object) -> tuple[int, int, int, int]:
        assert handle is HANDLE
        self._check(self.rows)
        return self.rows or (0, 0, 0, 0)

    def nvmlDeviceGetFieldValues(self, handle: object, fields: list[int]) -> list[SimpleNamespace]:
        assert handle is HANDLE and fields == [self.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        self._check()
        status = self.NVML_ERROR_NOT_SUPPORTED if self.recovery is None else self.NVML_SUCCESS
        return [SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(uiVal=self.recovery or 0))]
