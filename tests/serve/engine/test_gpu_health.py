"""NVML's reports of a GPU decide whether an engine works on it. The library is a stand-in: no GPU is at hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import HANDLE, FakeNvml, NVMLError

from skylapse.serve.core.config import ServeConfig
from skylapse.serve.engine.gpu_health import GpuHealth, GpuSick, GpuWatch
from skylapse.serve.engine.xids import SEEN_TO, XIDS, xid


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml()


def set_to(**state: Any) -> Callable[[FakeNvml], None]:
    def set_all(nvml: FakeNvml) -> None:
        for name, value in state.items():
            setattr(nvml, name, value)

    return set_all


FAULTS = {
    "Xid 79 (GPU has fallen off the bus)": set_to(xids=[79]),
    "Xid 48 (double bit ECC error)": set_to(xids=[13, 48, 45]),
    "Xid 63 (GPU memory remapping event)": set_to(xids=[63]),
    "2 uncorrectable ECC errors": set_to(ecc=2),
    "a row of its memory could not be replaced by a spare one": set_to(rows=(0, 1, 0, 1)),
    "a row of its memory waits to be replaced, which a reset of the GPU does": set_to(rows=(0, 1, 1, 0)),
    "NVML says: GPU is lost": set_to(error=FakeNvml.NVML_ERROR_GPU_IS_LOST),
    "NVML says: GPU requires restart": set_to(error=FakeNvml.NVML_ERROR_RESET_REQUIRED),
    "the driver wants the GPU reset": set_to(recovery=1),
    "the driver wants the machine restarted": set_to(recovery=2),
    "the driver wants the GPU drained and reset": set_to(recovery=4),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_that_comes_while_an_engine_runs_is_the_reason(reason: str, nvml: FakeNvml) -> None:
    health = GpuHealth(nvml, HANDLE)
    assert health.look() is None
    FAULTS[reason](nvml)
    assert health.look() == reason
    nvml.error, nvml.ecc = None, 99
    assert health.look() == reason, "the first one is what is told"


@pytest.mark.parametrize("code", [13, 31, 43, 45, 32, 68, 69])
def test_an_application_s_xid_is_told_and_drains_nothing(
    code: int, nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    health = GpuHealth(nvml, HANDLE)
    nvml.xids = [code]
    assert health.look() is None and health.facts == {"gpu_xids": [code]}
    assert f"Xid {code} (" in caplog.text


@pytest.mark.parametrize("code", [48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140])
def test_the_hardware_s_xid_drains_unless_the_operator_ignores_it(code: int, nvml: FakeNvml) -> None:
    nvml.xids = [code]
    assert GpuHealth(nvml, HANDLE).look() == f"Xid {code} ({XIDS[code].what})"
    nvml.xids = [code]
    assert GpuHealth(nvml, HANDLE, ignored_xids=(code,)).look() is None


def test_an_xid_that_nobody_knows_is_told_and_drains_nothing(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    health = GpuHealth(nvml, HANDLE)
    nvml.xids = [*range(1000, 1100)]
    assert health.look() is None and health.look() is None
    assert health.facts == {"gpu_xids": [*range(1092, 1100)]} and "Xid 1000 (not in the table)" in caplog.text


def test_what_drains_is_what_nvidia_says_or_has_a_reason() -> None:
    for code, entry in XIDS.items():
        assert entry.drains == (entry.action in SEEN_TO or bool(entry.why)), code
        assert not (entry.why and entry.action in SEEN_TO), f"{code} needs no reason of ours"
    assert not xid(999).drains and [code for code in XIDS if XIDS[code].why] == [63, 92, 94, 171, 172]


# ------------------------------------------------------------------------------------------------------- at the start


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"rows": (0, 1, 0, 1)}, "could not be replaced"),
        ({"recovery": 1}, "the driver wants the GPU reset"),
        ({"recovery": 2}, "the driver wants the machine restarted"),
        ({"error": 15}, "GPU is lost"),
        ({"error": 16}, "GPU requires restart"),
    ],
)
def test_no_engine_starts_on_a_gpu_that_nothing_can_work_on(state: dict[str, Any], said: str, nvml: FakeNvml) -> None:
    set_to(**state)(nvml)
    with pytest.raises(GpuSick, match=said) as refused:
        GpuHealth(nvml, HANDLE)
    assert "gpu_health" in str(refused.value) and "\n" not in str(refused.value)


def test_what_was_there_before_is_told_and_does_not_drain_one_engine_after_the_other(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.ecc, nvml.rows, nvml.recovery = 7, (0, 1, 1, 0), 4
    health = GpuHealth(nvml, HANDLE)
    assert health.look() is None and "the driver wants the GPU drained and reset" in caplog.text
    nvml.ecc = 8
    assert health.look() == "1 uncorrectable ECC errors"


def test_a_card_or_driver_that_tells_nothing_is_well(nvml: FakeNvml) -> None:
    nvml.ecc = nvml.rows = nvml.recovery = None
    nvml.has_events = False
    health = GpuHealth(nvml, HANDLE)
    assert health.look() is None and health.facts == {} and nvml.open_sets == 0
    nvml.ecc, nvml.rows = 3, (0, 0, 1, 0)  # it did not answer at the start
    assert health.look() is None
    nvml.error = FakeNvml.NVML_ERROR_NOT_SUPPORTED
    assert health.look() is None

    class Older(FakeNvml):  # type: ignore[misc]
        @property
        def nvmlDeviceGetRemappedRows(self) -> Any:
            raise AttributeError

    assert GpuHealth(Older(), HANDLE).look() is None


# -------------------------------------------------------------------------------------------------------- the thread


def test_a_watch_finds_it_and_gives_the_events_back(nvml: FakeNvml) -> None:
    looked = threading.Event()

    class Looked(GpuHealth):
        def look(self) -> str | None:
            reason = super().look()
            if reason:
                looked.set()
            return reason

    watch = GpuWatch(Looked(nvml, HANDLE), look_s=0.01)
    nvml.xids = [119]
    assert looked.wait(5) and watch.reason == "Xid 119 (GSP RPC timeout)"
    watch.close()
    assert nvml.open_sets == 0


def test_a_library_that_hangs_or_breaks_holds_nobody_up(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    asked, free = threading.Event(), threading.Event()

    class Hangs(GpuHealth):
        def look(self) -> str | None:
            asked.set()
            free.wait(20)
            raise ZeroDivisionError

    watch = GpuWatch(Hangs(nvml, HANDLE), look_s=0.01)
    assert asked.wait(5)
    watch.close(within_s=0.05)
    assert watch.reason is None and nvml.open_sets == 1
    free.set()
    watch._thread.join(5)
    with caplog.at_level(logging.WARNING):
        assert "NVML could not be asked" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's, when it is imported
def test_a_replica_tells_why_drains_and_fails_its_health_check_once_its_jobs_are_given_back() -> None:
    pytest.importorskip("ray")
    from skylapse.serve.deployment.replica import EngineReplica
    from skylapse.serve.store.processes import READY, SICK

    class Quiet(EngineReplica):
        def __del__(self) -> None:  # type: ignore[override]
            """Serve's is a coroutine."""

    replica: Any = object.__new__(Quiet)
    counted: list[str] = []
    watch = SimpleNamespace(reason=None)
    worker = SimpleNamespace(is_draining=False, is_idle=False, is_lost=False, keeper=SimpleNamespace(is_alive=True))
    replica.__dict__ |= {"gpu": watch, "worker": worker, "_sick_s": None, "_standing": {"state": READY}, "_loop": None}
    replica.__dict__ |= {"measures": SimpleNamespace(sick=lambda: counted.append("sick"))}
    replica.config = SimpleNamespace(drain_s=60.0)
    replica._drain_where_due(False)
    replica.check_health()
    assert replica._standing == {"state": READY} and not worker.is_draining
    watch.reason = "Xid 79 (GPU has fallen off the bus)"
    for _ in range(2):
        replica._drain_where_due(False)
    assert replica._standing == {"state": SICK, "reason": watch.reason} and worker.is_draining
    assert counted == ["sick"], "once"
    replica.check_health()  # its jobs are not given back yet
    worker.is_idle = True
    with pytest.raises(RuntimeError, match="the GPU is sick: Xid 79"):
        replica.check_health()
    worker.is_idle, replica._sick_s = False, replica._sick_s - 61.0
    with pytest.raises(RuntimeError, match="the GPU is sick"):  # a step on it never ends
        replica.check_health()


def test_the_configuration_takes_numbers_alone() -> None:
    assert ServeConfig(ignored_xids=[63, 92]).ignored_xids == (63, 92)
    with pytest.raises(ValueError):
        ServeConfig(ignored_xids=["all"])


def test_the_library_has_all_that_the_stand_in_has() -> None:
    """NVIDIA's own bindings, of which Ray ships a copy."""
    pynvml = pytest.importorskip("ray._private.thirdparty.pynvml")
    for name in dir(FakeNvml):
        if name.startswith(("nvml", "NVML_")):
            assert hasattr(pynvml, name), name
            if isinstance(getattr(FakeNvml, name), int):
                assert getattr(pynvml, name) == getattr(FakeNvml, name), name
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    assert isinstance(lost, pynvml.NVMLError) and str(lost) == str(NVMLError(lost.value)) == "GPU is lost"
