"""Memory, utilisation and power of a GPU, read through NVML; nothing without a GPU or `nvidia-ml-py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)
Facts = dict[str, float]


def open_nvml(index: int) -> tuple[Any, Any] | None:
    """Return (the library, its handle of torch's device `index`); None without a library, a driver or such a device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(_uuid(index))
    except Exception as error:  # the service works without
        logger.info("no GPU facts: %s", type(error).__name__)
        return None


def gpu_reader(index: int) -> Callable[[], Facts]:
    """Return a reader of the memory (bytes), utilisation (a share) and power (watts) of torch's device `index`."""
    opened = open_nvml(index)
    if opened is None:
        return dict
    pynvml, handle = opened

    def read() -> Facts:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            return {
                "gpu_memory_bytes": float(memory.used),
                "memory_utilization": round(memory.used / memory.total, 4),
                "gpu_utilisation": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                "gpu_power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
        except pynvml.NVMLError:  # MIG slices do not tell their utilisation
            return {}

    return read


def _uuid(index: int) -> Any:
    """Return the device's UUID: NVML counts all devices, torch those that CUDA_VISIBLE_DEVICES leaves."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
