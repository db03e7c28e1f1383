"""A request's state on disk between two steps, and its way back into an engine, to the bit.

Two files: `state-K.safetensors` with the tensors, and `state.json`, which names it, its digest and everything else.
The second is replaced when the first is complete, so a crash at any moment leaves the checkpoint before. What caches
hold is not stored: the step after a checkpoint is computed in every run, interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .conditioning import Conditioning
from .given import Given
from .models.model import Model
from .models.text_cache import TextCache
from .request import VideoRequest
from .sampler.solver import restore_state, state_record
from .sampler.state import state_tensors
from .terms import Terms
from .trajectory import Trajectory

VERSION = 2
INDEX = "state.json"


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
    record, tensors = _read(folder)
    for name, here in _belongs_to(model).items():
        if record[name] != here:
            raise ValueError(f"the checkpoint was made with {name} {record[name]!r}, and this engine has {here!r}")
    try:
        request = VideoRequest(**_tuples(record["request"]))
        terms = Terms(**record["terms"], checkpoint_dir=folder, deadline_s=deadline_s)
        t = Trajectory(ticket, model, request, text_cache, tensors["latents"], terms)
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items() if name != "generator"} | {
            "generator": tensors["generator"]
        }
        t.solver_state = restore_state(record["solver"], tensors)
        if (t.solver_state.schedule, t.solver_state.first_step) != (t.schedule, t.first_step):
            raise ValueError("its noise schedule is not the one that this engine makes for the request")
        t.latents = tensors["latents"]
        t.generator.set_state(tensors["generator"])
        t.branch_encoder.image_rows = tensors.get("image_rows")
        t.conditioning = _conditioning(record, tensors, model.device)
        t.cache.trace = record["trace"]
        t.cache.close_calls = tuple(record["close_calls"])
        t.cache.peak_state_bytes = record["peak_state_bytes"]
        t.timings_s = dict(record["timings_s"])
        if len(t.cache.trace) != t.steps_done:
            raise ValueError(f"it has decided {len(t.cache.trace)} steps and taken {t.steps_done}")
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the checkpoint in {folder} is incomplete: {type(error).__name__}: {error}") from error
    return t


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        record = json.loads((folder / INDEX).read_text())
        version, name, digest = record["version"], record["tensors"], record["sha256"]
        if version != VERSION:
            raise ValueError(f"the checkpoint in {folder} has version {version}, and this engine reads {VERSION}")
        data = (folder / Path(name).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"the checkpoint in {folder} is corrupted: {name} is not what {INDEX} describes")
        return record, load(data)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the checkpoint in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _belongs_to(model: Model) -> dict[str, str]:
    """What must be the same for the result to be."""
    return {
        "weights": model.fingerprint,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _request_record(request: VideoRequest) -> dict[str, Any]:
    """Without images and video: what they became is among the tensors."""
    bare = replace(request, image=None, last_image=None, video=None)
    return {name: getattr(bare, name) for name in VideoRequest.__slots__}


def _conditioning(record: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Conditioning:
    flags = tuple(bool(flag) for flag in record["frame_is_given"])
    pieces = [
        Given(int(name.removeprefix("pixels_")), tensor.cpu().numpy())
        for name, tensor in tensors.items()
        if name.startswith("pixels_")
    ]
    given = tensors.get("given")
    return Conditioning(
        frame_is_given=flags,
        given=given,
        mask=None if given is None else torch.tensor(flags, device=device).view(1, -1, 1, 1),
        channels=tensors.get("channels"),
        pixels=tuple(sorted(pieces, key=lambda piece: piece.start)),
    )


def _tuples(request: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in request.items()}


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
