"""Decides by NVML whether a GPU is fit for work: Xid and ECC errors, rows that cannot be replaced, a lost GPU.

Faults from before the engine's start are reported but are no reason to drain: otherwise, on a card that waits for its
reset, an engine would be replaced for ever. Later faults are. None of this was run on a GPU: the tests use a stand-in
of the library.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Any

from .xids import xid

logger = logging.getLogger(__name__)
LOOK_S = 1.0
EVENT_MS = 1  # a look waits no longer for an event
MAX_EVENTS = 64  # of one look: a card that breaks sends many
FACTS_KEPT = 8  # Xids that are told, the newest

# NVML's recovery actions (drivers from R565): the words that are told, and whether they say that nothing can work here.
RECOVERY = {
    "GPU_RESET": ("the driver wants the GPU reset", True),
    "NODE_REBOOT": ("the driver wants the machine restarted", True),
    "GPU_RESET_BUS": ("the driver wants the GPU reset over the bus", True),
    "DRAIN_AND_RESET": ("the driver wants the GPU drained and reset", False),
}
ROWS_FAILED = "a row of its memory could not be replaced by a spare one"
ROWS_PENDING = "a row of its memory waits to be replaced, which a reset of the GPU does"


class GpuSick(RuntimeError):
    """The GPU needs repair or a reset before anything works on it."""


class GpuHealth:
    """The health of one GPU. nvml: the module `pynvml`, or its stand-in; handle: NVML's, of the device."""

    def __init__(self, nvml: Any, handle: Any, ignored_xids: Collection[int] = ()) -> None:
        """Take the first readings. Raises GpuSick if the card reports that nothing can work on it."""
        self._nvml, self._handle, self._ignored = nvml, handle, frozenset(ignored_xids)
        self.reason: str | None = None  # the first
        self.xids: list[int] = []  # that were reported since the start
        self._events = self._register()
        self._ecc_before: int | None = self._read(self._ecc)
        self._rows_before: tuple[bool, bool] | None = self._read(self._rows)
        self._recovery_before: str | None = self._read(self._recovery)
        pending, failed = self._rows_before or (False, False)
        words, is_final = RECOVERY.get(self._recovery_before or "", ("", False))
        if self.reason or is_final or failed:
            why = self.reason or (words if is_final else ROWS_FAILED)
            raise GpuSick(f"no engine starts on this GPU: {why} (with gpu_health false it would)")
        if words or pending:
            logger.warning("the GPU works, and wants to be seen to: %s", words or ROWS_PENDING)

    @property
    def facts(self) -> dict[str, Any]:
        """The GPU's facts in an engine's heartbeat."""
        return {"gpu_xids": self.xids[-FACTS_KEPT:]} if self.xids else {}

    def look(self) -> str | None:
        """Return the reason, since the start, not to work on this GPU any more; None if it is healthy."""
        if self.reason is None:
            self._look_at_events()
            self._look_at_memory()
            recovery = self._read(self._recovery)
            if recovery != self._recovery_before and recovery in RECOVERY:
                self._sick(RECOVERY[recovery][0])
        return self.reason

    def close(self) -> None:
        if self._events is not None:
            self._read(lambda: self._nvml.nvmlEventSetFree(self._events))
            self._events = None

    # --- what NVML tells ------------------------------------------------------------------------------------------

    def _register(self) -> Any:
        """Return a set of events of this GPU; None if it reports none."""
        nvml = self._nvml

        def register() -> Any:
            wanted = nvml.nvmlEventTypeXidCriticalError & nvml.nvmlDeviceGetSupportedEventTypes(self._handle)
            if not wanted:
                return None
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._handle, wanted, events)
            return events

        return self._read(register)

    def _look_at_events(self) -> None:
        if self._events is None:
            return
        for _ in range(MAX_EVENTS):
            event = self._read(lambda: self._nvml.nvmlEventSetWait_v2(self._events, EVENT_MS))
            if event is None:
                return
            if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                self._take(int(event.eventData))

    def _look_at_memory(self) -> None:
        """Compare ECC errors and rows with their first readings, which are taken here if they failed at the start."""
        ecc, rows = self._read(self._ecc), self._read(self._rows)
        if ecc is not None:
            self._ecc_before = ecc if self._ecc_before is None else self._ecc_before
            if ecc > self._ecc_before:
                self._sick(f"{ecc - self._ecc_before} uncorrectable ECC errors")
        if rows is not None:
            self._rows_before = rows if self._rows_before is None else self._rows_before
            if rows[1] and not self._rows_before[1]:
                self._sick(ROWS_FAILED)
            if rows[0] and not self._rows_before[0]:
                self._sick(ROWS_PENDING)

    def _take(self, code: int) -> None:
        known = xid(code)
        self.xids.append(code)
        if known.drains and code not in self._ignored:
            self._sick(f"Xid {code} ({known.what})")
        else:
            logger.warning("the GPU reported Xid %d (%s), for which no engine is drained", code, known.what)

    def _ecc(self) -> int:
        """Return the uncorrectable errors since the driver was loaded."""
        nvml = self._nvml
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return int(nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, since))

    def _rows(self) -> tuple[bool, bool]:
        """Return (the remapping of a row waits for a reset, the remapping of a row has failed)."""
        _, _, pending, failed = self._nvml.nvmlDeviceGetRemappedRows(self._handle)
        return bool(pending), bool(failed)

    def _recovery(self) -> str | None:
        """Return the name of NVML's recovery action; None for none, and for a driver that tells none."""
        nvml = self._nvml
        (value,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        if value.nvmlReturn != nvml.NVML_SUCCESS:
            return None
        for word in RECOVERY:
            if value.value.uiVal == getattr(nvml, f"NVML_GPU_RECOVERY_ACTION_{word}", None):
                return word
        return None

    def _read(self, ask: Callable[[], Any]) -> Any:
        """Return NVML's answer; None if this card or driver does not tell it. A lost GPU makes this one sick."""
        nvml = self._nvml
        try:
            return ask()
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                self._sick(f"NVML says: {error}")
        except AttributeError:  # a library that is older than the function
            pass
        return None

    def _sick(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            logger.error("the GPU is sick: %s", reason)


class GpuWatch:
    """Looks once a second, in a thread of its own: NVML may hang on a broken card, and heartbeats must not."""

    def __init__(self, health: GpuHealth, look_s: float = LOOK_S) -> None:
        self.health, self._look_s = health, look_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skylapse-gpu-health", daemon=True)
        self._thread.start()

    @property
    def reason(self) -> str | None:
        return self.health.reason

    def close(self, within_s: float = 2.0) -> None:
        """Stop looking; a look that hangs is left to the end of the process."""
        self._closing.set()
        self._thread.join(within_s)
        if not self._thread.is_alive():
            self.health.close()

    def _run(self) -> None:
        while not self._closing.wait(self._look_s):
            try:
                self.health.look()
            except Exception:  # of the library: nothing is known, and the engine works on
                logger.warning("NVML could not be asked how the GPU is", exc_info=True)
                return
