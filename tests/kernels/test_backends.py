"""What an engine asks for: what is decided once, told once, refused at the start, and kept apart from other engines."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from skylapse import Engine, VideoRequest
from skylapse.cli import main
from skylapse.kernels import attention as module
from skylapse.kernels import attention_backends, backends, toolchain
from skylapse.kernels.attention_backends import Call
from skylapse.kernels.backends import CHOICES, Backends, current, parse
from skylapse.runtime.families.wan import denoiser as wan

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    yield
    toolchain.set_fault(CUDA, None)
    backends.fault_of_triton.cache_clear()
    attention_backends.trial.cache_clear()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers as one does, where everything works that is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: 91900)
    monkeypatch.setattr(backends, "fault_of_triton", lambda device: None)
    monkeypatch.setattr(attention_backends, "try_out", lambda name, device: None)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["attention", "attention=best", "adaln=triton", "attention=sdpa,", "=", "a=b=c"])
def test_unknown_operation_or_backend_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be like attention=triton\|.*\|sage\|cudnn\|flash\|sdpa.*, got "):
        parse(text)


# --- deciding ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("h100")
def test_choice_is_decided_and_logged_once_a_kind_of_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mine = Backends()
    calls = [Call(128, kind, biased) for kind in ("short", "long") for biased in (False, True)]
    for _ in range(2):
        assert [mine.choose("attention", CUDA, call).name for call in calls] == ["cudnn", "triton"] * 2
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" (")[0] for message in messages] == [
        "attention on cuda:0: cudnn",
        "attention on cuda:0: triton",
    ]


def test_what_is_left_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: 0)
    monkeypatch.setattr(toolchain, "triton", None)
    monkeypatch.setattr(toolchain, "MISSING", "No module named 'triton'")
    assert Backends().choose("attention", CUDA).name == "sdpa"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "Triton cannot be imported: No module named 'triton'" in record.message


def test_triton_that_cannot_launch_is_broken_on_that_device_and_on_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on this machine: it imports, and there is no driver."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        here, there = torch.empty(4, device="cuda:0"), torch.empty(4, device="cuda:1")
    assert toolchain.launches(here)
    Backends().prepare(CUDA)
    assert not toolchain.launches(here) and toolchain.launches(there)
    assert str(toolchain.fault(CUDA)).startswith("Triton is broken: ")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (1 + len(CHOICES))


def test_old_architecture_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert backends.fault_of_triton(CUDA) == "kernels need sm_80 or newer, this is sm_75"


# --- asked for by name ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("sage", "sageattention is not installed"),
        ("flash3", "flash_attn_interface is not installed"),
        ("triton", None),
        ("sdpa", None),
        ("varlen", None),
    ],
)
def test_start_is_refused_where_the_device_cannot_run_what_was_asked_for(asked: str, reason: str | None) -> None:
    mine = Backends({"attention": asked})
    if reason is None:
        mine.prepare(CUDA)
        assert mine.choose("attention", CUDA).name == asked
    else:
        with pytest.raises(ValueError, match=f"^SKYLAPSE_KERNELS: attention={asked} cannot serve on cuda:0: {reason}$"):
            mine.prepare(CUDA)


@pytest.mark.usefixtures("h100")
def test_start_is_refused_where_it_is_installed_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_importable", lambda module: True)
    monkeypatch.setattr(attention_backends, "try_out", lambda name, device: "ImportError: undefined symbol")
    with pytest.raises(ValueError, match="attention=sage cannot serve on cuda:0: it is broken: ImportError: undefined"):
        Backends({"attention": "sage"}).prepare(CUDA)
    assert Backends().choose("attention", CUDA).name == "triton", "flash3 and cudnn by default are passed over"


def test_command_line_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=sage")
    assert main(["generate", "a red circle", "--device", "cpu", "--output", "clip.mp4"]) == 2
    told = "skylapse: error: SKYLAPSE_KERNELS: attention=sage cannot serve on cpu: it needs a CUDA device\n"
    assert capsys.readouterr().err.endswith(told)


# --- two engines in one process ---------------------------------------------------------------------------------------


def test_backends_are_those_of_the_engine_at_work_in_this_thread() -> None:
    one, other = Backends({"attention": "sdpa"}), Backends({"attention": "triton"})
    seen: list[Backends] = []
    with one.active():
        with other.active():
            assert current() is other
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert current() is one
    assert current().asked == {} and seen == [current()]


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = CUDA  # type: ignore[assignment]


def test_two_engines_take_different_backends_at_once(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps meet in the middle of attention, each in a thread of its own, and both go on to their own."""
    base = Engine.from_pretrained(str(demo_folder), device="cpu")
    engines = {
        name: Engine(base.model, dataclasses.replace(base.settings, kernels={"attention": name}))
        for name in ("triton", "flash")
    }
    meeting, taken = threading.Barrier(2), {name: set[str]() for name in engines}
    by, first = module.attention_by, threading.local()

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_q: tuple[int, ...], *rest: Any) -> Tensor:
        if not getattr(first, "met", False):
            first.met = True
            meeting.wait(60)
        there, keys, values = (x.bfloat16().as_subclass(Elsewhere) for x in (q, k, v))
        with toolchain.told_capability(90):
            name = module._backend(there, keys, values, cu_q, cu_q, None, with_lse=False)
            taken[threading.current_thread().name].add(name)
        return by("sdpa", q, k, v, cu_q, rest[0] if rest else cu_q, *rest[1:])

    monkeypatch.setattr(wan, "attention", attention)
    request = VideoRequest(prompt="a red circle", num_frames=5, num_inference_steps=1)
    threads = [
        threading.Thread(target=lambda engine=engine: engine.generate_latents(request), name=name)  # type: ignore[misc]
        for name, engine in engines.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert taken == {"triton": {"triton"}, "flash": {"flash"}}


@pytest.mark.usefixtures("h100")
def test_what_was_decided_for_one_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Backends(), Backends({"attention": "sdpa"})
    assert [it.choose("attention", CUDA).name for it in (one, other, one)] == ["cudnn", "sdpa", "cudnn"]


def test_video_says_what_was_lossy(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = Backends({"attention": "sage"}).lossy
    assert (lossy(CUDA), lossy(torch.device("cpu"))) == (("attention=sage",), ())
    assert Backends({"attention": "sdpa"}).lossy(CUDA) == ()
    base = Engine.from_pretrained(str(demo_folder), device="cpu")
    engine = Engine(base.model, dataclasses.replace(base.settings, kernels={"attention": "triton-int8"}))
    request = VideoRequest(prompt="a red circle", num_frames=5, num_inference_steps=1)
    assert engine.generate(request).metadata.lossy_kernels == ()
    of_cuda = Backends.lossy
    monkeypatch.setattr(Backends, "lossy", lambda self, device: of_cuda(self, CUDA))
    assert engine.generate(request).metadata.lossy_kernels == ("attention=triton-int8",)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what dynamo imports
@pytest.mark.usefixtures("h100")
def test_choosing_does_not_break_a_compiled_graph(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def run(x: Tensor) -> Tensor:
        return x + 1 if module._chosen(CUDA, (0, 4, 9), (0, 4, 9), 2, 64, True) == "triton" else x

    with Backends().active():
        compiled: Callable[[Tensor], Tensor] = torch.compile(run, fullgraph=True, backend="eager")
        assert [compiled(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert sum("attention on" in record.getMessage() for record in caplog.records) == 1
