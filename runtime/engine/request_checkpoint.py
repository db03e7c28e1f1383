"""A request's state on disk between two steps, and its way back into an engine, to the bit.

Two files: `state-K.safetensors` with the tensors, and `state.json`, which names it, its digest and everything else.
The second is replaced when the first is complete, so a crash at any moment leaves the checkpoint before. What caches
hold is not stored: the step after a checkpoint is computed in every run, interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...kernels.tables import send
from ..conditioning.given import Given
from ..conditioning.latents import Conditioning
from ..core.request import VideoRequest
from ..core.submit_options import Terms
from ..models.model import Model
from ..models.text_cache import TextCache
from ..sampler.solver import restore_state, state_record
from ..sampler.state import SolverState, state_tensors
from .checkpoint_schema import INDEX as INDEX  # how a service tells that a folder holds a checkpoint
from .checkpoint_schema import VERSION, read_record
from .trajectory import Trajectory

PIXELS = ("image", "last_image", "video")  # of a request


def save_trajectory(t: Trajectory, folder: Path) -> None:
    """Write the state of a request that is between two denoising steps; an earlier one there is replaced."""
    given = t.conditioning
    assert given is not None and t.latents is not None
    tensors = {"latents": t.latents, "generator": t.generator.get_state(), **state_tensors(t.solver_state)}
    optional = {"given": given.given, "channels": given.channels, "image_rows": t.branch_encoder.image_rows}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors |= {f"pixels_{piece.start}": torch.tensor(piece.frames) for piece in given.pixels}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{t.steps_done}.safetensors"
    _write(folder / name, data)
    record = {
        "version": VERSION,
        "tensors": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        **_belongs_to(t.model),
        "request": _request_record(t.request),
        "terms": {k: v for k, v in asdict(t.terms).items() if k not in ("checkpoint_dir", "deadline_s")},
        "solver": state_record(t.solver_state),
        "frame_is_given": given.frame_is_given,
        "trace": t.cache.trace,
        "close_calls": t.cache.close_calls,
        "peak_state_bytes": t.cache.peak_state_bytes,
        "timings_s": t.timings_s,
    }
    _write(folder / INDEX, json.dumps(record, indent=1).encode())
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_trajectory(
    folder: Path, ticket: int, model: Model, text_cache: TextCache, deadline_s: float | None = None
) -> Trajectory:
    """The trajectory that was saved, as it was. ValueError names what is broken, or what differs from this engine."""
    deadline = Terms(deadline_s=deadline_s)  # a mistake in it is the caller's, not the checkpoint's
    try:
        record = read_record(folder)
        _check_belongs(record, model)
        tensors = _read_tensors(folder, record)
        return _restore(folder, ticket, model, text_cache, deadline, record, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint in {folder} cannot be resumed: {error}") from error


def _restore(
    folder: Path,
    ticket: int,
    model: Model,
    text_cache: TextCache,
    deadline: Terms,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Trajectory:
    request = _request(record["request"]).resolved(model.defaults, model.limits)
    terms = Terms(**record["terms"], checkpoint_dir=folder, deadline_s=deadline.deadline_s)
    t = Trajectory(ticket, model, request, text_cache, terms=terms)
    _check_tensors(t, tensors)
    _set_generator(t.generator, tensors["generator"])
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items() if name != "generator"}
    t.solver_state = _solver_state(t, record["solver"], tensors)
    t.latents = tensors["latents"]
    t.branch_encoder.image_rows = tensors.get("image_rows")
    t.conditioning = _conditioning(t, record["frame_is_given"], tensors)
    if len(record["trace"]) != t.steps_done:
        raise ValueError(f"it has decided {len(record['trace'])} steps and taken {t.steps_done}")
    if any(step >= t.steps_done for step in record["close_calls"]):
        raise ValueError(f"close_calls must be of the {t.steps_done} steps taken, got {short(record['close_calls'])}")
    t.cache.trace, t.cache.close_calls = record["trace"], tuple(record["close_calls"])
    t.cache.peak_state_bytes, t.timings_s = record["peak_state_bytes"], dict(record["timings_s"])
    return t


def _solver_state(t: Trajectory, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SolverState:
    """Of the schedule that this engine makes for the request, which must be the one that was saved."""
    step_index, expected = record.get("step_index"), json.loads(json.dumps(state_record(t.solver_state)))
    if {**record, "step_index": t.first_step} != expected:
        raise ValueError("its noise schedule is not the one that this engine makes for the request")
    if not isinstance(step_index, int) or not t.first_step < step_index < t.schedule.num_steps:
        between = f"{t.first_step + 1} to {t.schedule.num_steps - 1}"
        raise ValueError(f"step_index of its solver must be {between}, got {short(step_index)}")
    weights = t.solver_state.plan[step_index - t.first_step] if t.solver_state.plan else None
    needed = {f"clean_prediction_{age}" for age in range(weights.num_earlier if weights else 0)}
    needed |= {"last_sample"} if weights and weights.corrector else set()
    held = {name for name in tensors if name.startswith(("clean_prediction_", "last_sample"))}
    if held != needed:
        raise ValueError(f"its solver's tensors at step {step_index} must be {sorted(needed)}, got {sorted(held)}")
    return restore_state(expected | {"step_index": step_index}, tensors)


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    try:
        generator.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"generator must be the state of one: {error}") from error


def _check_tensors(t: Trajectory, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for the first that is missing, of no use to this request, or of another type or shape than its own."""
    config, (width, height, _) = t.model.experts[0].config, t.request.size
    kinds: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {  # None: any number
        r"latents|given|last_sample|clean_prediction_\d": (torch.float32, t.shape),
        "channels": (torch.float32, (config.in_channels - config.out_channels, *t.shape[1:])),
        "image_rows": (torch.float32, (None, config.image_dim)),
        "generator": (torch.uint8, tuple(t.generator.get_state().shape)),
        r"pixels_\d{1,5}": (torch.uint8, (None, height, width, 3)),
    }
    needs = {"channels": t.model.folder.concatenates_image, "image_rows": t.model.image_encoder is not None}
    needed = {"latents", "generator", *(name for name, is_needed in needs.items() if is_needed)}
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"it has no {missing[0]}")
    for name, tensor in tensors.items():
        kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), None)
        if kind is None or not needs.get(name, True):
            raise ValueError(f"it has a tensor {short(name)}, which this request has no use for")
        dtype, shape = kind
        fits = len(shape) == tensor.dim() and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if tensor.dtype != dtype or not fits:
            raise ValueError(f"{name} must be {_described(dtype, shape)}, got {_described(tensor.dtype, tensor.shape)}")


def _described(dtype: torch.dtype, shape: Iterable[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} [{sizes}]"


def _read_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    name = record["tensors"]
    try:
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ValueError(f"it is corrupted: {name} is not what {INDEX} describes")
        return load(data)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"it cannot be read: {type(error).__name__}: {error}") from error


def _check_belongs(record: Mapping[str, Any], model: Model) -> None:
    for name, here in _belongs_to(model).items():
        if record[name] != here:
            raise ValueError(f"it was made with {name} {short(record[name])}, and this engine has {here!r}")


def _belongs_to(model: Model) -> dict[str, str]:
    """What must be the same for the result to be."""
    return {
        "weights": model.fingerprint,
        "device": model.device.type,
        "dtype": model.precision,
    }


def _request_record(request: VideoRequest) -> dict[str, Any]:
    """Without images and video: what they became is among the tensors."""
    bare = replace(request, image=None, last_image=None, video=None)
    return {name: getattr(bare, name) for name in VideoRequest.__slots__}


def _request(record: dict[str, Any]) -> VideoRequest:
    """Files that a record names are never read: what they became is among the tensors."""
    for name in PIXELS:
        if record.get(name) is not None:
            raise ValueError(f"{name} of its request must be null, got {short(record[name])}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    return VideoRequest(**fields)


def _conditioning(t: Trajectory, flags: list[bool], tensors: Mapping[str, Tensor]) -> Conditioning:
    if len(flags) != t.shape[1]:
        raise ValueError(f"frame_is_given must have {t.shape[1]} entries, got {len(flags)}")
    given = tensors.get("given")
    if given is None and any(flags):
        raise ValueError(f"given must be {list(t.shape)}, got none")
    pieces = [
        Given(int(name.removeprefix("pixels_")), tensor.cpu().numpy())
        for name, tensor in tensors.items()
        if name.startswith("pixels_")
    ]
    return Conditioning(
        frame_is_given=tuple(flags),
        given=given,
        mask=None if given is None else send(torch.tensor(flags), t.model.device).view(1, -1, 1, 1),
        channels=tensors.get("channels"),
        pixels=tuple(sorted(pieces, key=lambda piece: piece.start)),
    )


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
