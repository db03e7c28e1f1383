"""After the warm-up no request needs a kernel that it has not launched, and nothing else tells that it was there.

Without a GPU the engine computes on the CPU's path, and each operation is given to its launcher too, with the kernel
replaced by one that notes what Triton would compile: constants, and the class of each number and address.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_checkpoint, with_room

from skylapse.kernels import (
    adaln,
    attention,
    attention_kernels,
    launches,
    linear_quantized,
    linear_quantized_kernels,
    patch_embed,
    qk_norm_rope,
    rms_norm,
    solver_step,
)
from skylapse.runtime.core.events import Failed
from skylapse.runtime.core.request import SOLVERS, VideoRequest
from skylapse.runtime.engine import warm_up as module
from skylapse.runtime.engine.engine import Engine
from skylapse.runtime.engine.warm_up import warm_up
from skylapse.runtime.sampler import fused
from skylapse.runtime.sampler.schedule import SolverConfig, make_schedule
from skylapse.runtime.sampler.solver import get_solver

triton = pytest.importorskip("triton")
Key = tuple[str, str]
PROFILES = Path(os.environ["SKYLAPSE_PROFILE_DIR"])
MODULES = (adaln, rms_norm, qk_norm_rope, patch_embed, solver_step, linear_quantized)
# Operations of torch, by module -> what launches them on CUDA.
OPERATIONS: dict[Any, dict[str, Callable[..., Any]]] = {
    adaln: {
        "_adaln_op": adaln._adaln_triton,
        "_gated_residual_op": adaln._gated_residual_triton,
        "_gated_residual_adaln_op": adaln._gated_residual_adaln_triton,
    },
    rms_norm: {"_op": rms_norm._triton},
    qk_norm_rope: {"_op": qk_norm_rope._triton},
    patch_embed: {
        "_patch_embed_op": patch_embed._patch_embed_triton,
        "_unpatchify_op": patch_embed._unpatchify_triton,
    },
    solver_step: {"_op": solver_step._triton},
    attention: {"_op": attention_kernels.launch},
    linear_quantized: {
        "_quantize_rows_op": linear_quantized._quantize_rows_triton,
        "_product_op": linear_quantized._product_triton,
    },
}


class Noted:
    """Stands in for a kernel, and notes the key under which Triton would look for its compiled code."""

    def __init__(self, kernel: Any, keys: set[Key], arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", arch, 32))
        self.name, self.keys = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}", keys
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = self.bind(*args, **kwargs)
            self.keys.add((self.name, f"{specialization} {options}"))

        return note


@pytest.fixture
def demo() -> Iterator[Engine]:
    engine = Engine.from_pretrained("demo", "cpu")
    yield engine
    engine.close()


@pytest.fixture
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Keys of all that an architecture (the parameter) would have been given since the set was cleared."""
    arch, keys = getattr(request, "param", 90), set[Key]()
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10))
    monkeypatch.setattr(attention, "_backend", lambda *tensors, **_: "triton")
    monkeypatch.setattr(launches, "arch_of", lambda device: arch)
    for where in (*MODULES, attention_kernels, linear_quantized_kernels):
        for name in [name for name in vars(where) if name.endswith("_kernel")]:
            monkeypatch.setattr(where, name, Noted(getattr(where, name), keys, arch))
        if hasattr(where, "arch_of"):
            monkeypatch.setattr(where, "arch_of", lambda device: arch)
        if callable(getattr(where, "launches", None)):
            monkeypatch.setattr(where, "launches", lambda tensor: True)
    monkeypatch.setattr(fused, "launches", lambda tensor: True)
    for where, operations in OPERATIONS.items():
        for name, launch in operations.items():
            monkeypatch.setattr(where, name, both(launch, getattr(where, name)))
    yield keys


def both(launch: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        launch(*args)
        return compute(*args)

    return run


# --- what is launched -------------------------------------------------------------------------------------------------

# (width, height, frames, solver, guidance, preview_every): latents and packs that 16 divides and not, short and long
ASKED = (
    (64, 64, 17, "unipc", 6.0, 1),
    (48, 80, 9, "dpmpp", 1.0, 2),
    (64, 96, 5, "euler", 6.0, 0),
    (32, 16, 1, "unipc", 1.0, 1),
    (128, 96, 5, "dpmpp", 6.0, 1),
    (96, 128, 13, "euler", 1.0, 2),
    (48, 48, 5, "unipc", 1.0, 0),
)


def requests_for(engine: Engine) -> list[tuple[VideoRequest, int]]:
    """Requests that the model takes, and after how many steps each is shown."""
    folder, multiple, requests = engine.model.folder, engine.limits.size_multiple, []
    for width, height, num_frames, solver, guidance, preview_every in ASKED:
        width, height = (-(-side // multiple) * multiple for side in (width, height))
        fields: dict[str, Any] = dict(width=width, height=height, num_frames=num_frames, solver=solver)
        if folder.concatenates_image or (folder.gives_frames and num_frames > 5):
            fields["image"] = np.zeros((32, 32, 3), np.uint8)
        request = VideoRequest(prompt="a red circle", guidance_scale=guidance, num_inference_steps=6, **fields)
        requests.append((request, preview_every))
    return requests


def make(engine: Engine, requests: list[tuple[VideoRequest, int]]) -> None:
    """Beside each other; who joins later is at another timestep."""
    for request, preview_every in requests:
        engine.submit(request, preview_every=preview_every)
        failed = [event.error for event in engine.step() if isinstance(event, Failed)]
        assert not failed, failed
    while engine.has_work():
        failed = [event.error for event in engine.step() if isinstance(event, Failed)]
        assert not failed, failed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {"demo": "demo"}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(save_checkpoint(name, tmp_path_factory.mktemp("tiny") / name))
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("launched", "name", "quantize"),
    [
        (80, "demo", None),
        (90, "demo", "int8"),
        (90, "wan2.1-i2v", None),
        (90, "wan2.2-ti2v-5b", None),
        (90, "wan2.2-t2v-a14b", None),
    ],
    indirect=["launched"],
)
def test_requests_after_the_warm_up_need_no_kernel_that_it_has_not_compiled(
    launched: set[Key], name: str, quantize: str | None, folders: Callable[[str], str]
) -> None:
    engine = Engine.from_pretrained(folders(name), "cpu", "bf16", quantize=quantize)
    launched.clear()
    warm_up(engine)
    warm = set(launched)
    assert {"attention", "adaln", "patch_embed", "qk_norm_rope", "solver_step"} <= {operation_of(key) for key in warm}
    asked = requests_for(engine)
    for requests in (*([request] for request in asked), asked):
        launched.clear()
        make(engine, requests)
        assert not launched - warm, (requests[0], [nearest(key, warm) for key in launched - warm])


def operation_of(key: Key) -> str:
    return key[0].partition(".")[0].removesuffix("_kernels")


def nearest(key: Key, warm: set[Key]) -> tuple[str, list[tuple[int, str, str]]]:
    """Return the arguments in which a key differs from the one that is most like it."""

    def differences(other: Key) -> list[tuple[int, str, str]]:
        pairs = enumerate(zip(other[1].split("), ("), key[1].split("), ("), strict=False))
        return [(place, one, two) for place, (one, two) in pairs if one != two]

    found = [differences(other) for other in warm if other[0] == key[0]]
    return key[0], min(found, key=len, default=[])


def test_kernel_that_no_clip_of_the_warm_up_is_for_is_missed(
    launched: set[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: by a solver that is left out, and by numbers of tokens that 16 divides alone."""
    engine = Engine.from_pretrained("demo", "cpu", "bf16")
    monkeypatch.setattr(module, "SOLVERS", ("euler",))
    monkeypatch.setattr(module, "SHORT", module.SHORT_EVEN)
    launched.clear()
    warm_up(engine)
    warm = set(launched)
    launched.clear()
    make(engine, requests_for(engine)[1:2])
    assert "solver_step" in {operation_of(key) for key in launched - warm}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", module.ALL_UPDATES)
def test_few_steps_take_a_solver_through_every_update_of_many(solver: str, order: int) -> None:
    def kinds(num_steps: int) -> set[tuple[bool, int]]:
        schedule = make_schedule(SolverConfig(solver, shift=5.0, solver_order=order), num_steps)
        plan = get_solver(solver).start(schedule).plan
        return {(bool(step.corrector), step.num_earlier) for step in plan}

    few = kinds(module.ALL_UPDATES[order])
    assert all(kinds(num_steps) <= few for num_steps in (1, 2, 3, 8, 14, 15, 20, 50))


# --- what is left of it -----------------------------------------------------------------------------------------------


def test_nothing_of_a_warm_up_is_left(demo: Engine, tmp_path: Path) -> None:
    def everything() -> tuple[Any, ...]:
        files = {(path, path.stat().st_mtime_ns) for path in PROFILES.rglob("*") if path.is_file()}
        codec = demo.model.codec
        return demo.pack_stats, demo.has_work(), demo.text_cache.num_bytes, files, codec.choose_decoder, codec.lane

    before = everything()
    random = torch.get_rng_state()
    told = warm_up(demo)
    assert told.num_clips > 20 and told.seconds > 0
    assert everything() == before and demo.step() == [] and torch.equal(torch.get_rng_state(), random)
    assert demo.submit(VideoRequest(prompt="a star", num_inference_steps=1, num_frames=1)) == 1, "a ticket was taken"


def test_failure_of_the_device_ends_the_start_with_its_reason(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("the kernel image is invalid")

    monkeypatch.setattr("skylapse.runtime.engine.batch.evaluate", broken)
    with pytest.raises(RuntimeError, match="the warm-up failed: RuntimeError: the kernel image is invalid"):
        warm_up(demo)


def test_clip_that_cannot_fit_is_left_out_and_told(demo: Engine, caplog: pytest.LogCaptureFixture) -> None:
    demo.memory = with_room(demo.memory, 1)
    try:
        assert warm_up(demo).num_clips == 0
    finally:
        del demo.memory
    assert "no warm-up of a clip of 48 x 48 x 9" in caplog.text
