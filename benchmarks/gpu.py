"""What a GPU tells of itself beside a figure: driver, clocks, power, temperature; by NVIDIA's library where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Reading = Callable[[], dict[str, float]]


def watch(device: torch.device) -> tuple[dict[str, Any], Reading]:
    """(what stays as it is, a function that reads what changes); both empty on a CPU and without the library."""
    if device.type != "cuda":
        return {}, dict
    major, minor = torch.cuda.get_device_capability(device)
    facts: dict[str, Any] = {"capability": 10 * major + minor, "cuda": torch.version.cuda}
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # NVML counts devices that torch may not see
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        facts["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except Exception as error:  # no library, no rights, a slice of a device: the figures go without
        return facts | {"no_readings": type(error).__name__}, dict

    def read() -> dict[str, float]:
        asked: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
        values = {}
        for name, ask in asked.items():
            try:
                values[name] = float(ask())
            except pynvml.NVMLError:  # what this device does not tell
                continue
        return values

    return facts, read
