"""Safetensors checkpoints in diffusers' folder format -> modules, streamed to their device and dtype.

The module is built on the `meta` device; every file's header is read and every key checked before any weight is. Then
one tensor at a time goes from the file to its place, so no second copy of the weights ever exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...kernels.weight_formats import WeightFormat
from .linear import Linear

WEIGHTS = "diffusion_pytorch_model"
QUANTIZED_ROWS = 1024  # at a time: 56 MB of fp32 of Wan 14B's widest


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor goes: rows of one parameter."""

    parameter: str
    rows: slice
    num_elements: int
    shape: tuple[int, ...]


def slots(module: nn.Module, rename: Callable[[str], str] = lambda name: name) -> dict[str, Slot]:
    """Checkpoint name -> slot, for every parameter; a fused `Linear` has one for each of its sources.

    `rename` turns our parameter names into the checkpoint's where they differ.
    """
    places: dict[str, Slot] = {}
    fused = {name: child for name, child in module.named_modules() if isinstance(child, Linear)}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in fused:
            places[rename(name)] = Slot(name, slice(None), parameter.numel(), tuple(parameter.shape))
            continue
        parent = owner.rpartition(".")[0]
        start = 0
        for source, num_rows in fused[owner].sources.items():
            key = ".".join(part for part in (parent, source, leaf) if part)
            shape = (num_rows, *parameter.shape[1:])
            places[rename(key)] = Slot(name, slice(start, start + num_rows), math.prod(shape), shape)
            start += num_rows
    return places


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    stem: str = WEIGHTS,
    fp32_parameters: Sequence[str] = (),
    unexpected_keys: Sequence[str] = (),
    rename: Callable[[str], str] = lambda name: name,
    quantized: Mapping[str, WeightFormat] = {},
) -> None:
    """Fill a module that lies on `meta` from a folder's safetensors files.

    Parameters whose name contains one of `fp32_parameters` stay fp32. Those of `quantized`, weights of a `Linear`, are
    kept in that format, made from the file's own numbers on the device. Raises ValueError naming the file and the keys
    that are missing, unexpected (but for those containing one of `unexpected_keys`) or wrongly shaped.
    """
    places = slots(module, rename)
    with ExitStack() as stack:
        files = [(path, stack.enter_context(_open(path))) for path in weight_files(folder, stem)]
        where = {key: (path, file) for path, file in files for key in file.keys()}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key, (_, file) in where.items()}
        check_keys(places, shapes, folder, unexpected_keys)
        allocate(module, device=device, dtype=dtype, fp32_parameters=fp32_parameters, quantized=quantized)
        parameters = dict(module.named_parameters())
        for key, slot in places.items():
            path, file = where[key]
            try:
                tensor = file.get_tensor(key).view(slot.shape)
            except SafetensorError as error:
                raise ValueError(f"{path.name}: cannot read {key}: {error}") from error
            if slot.parameter in quantized:
                _quantize(tensor, _owner(module, slot.parameter), slot.rows.start, device)
            else:
                parameters[slot.parameter].data[slot.rows].copy_(tensor)
    module.requires_grad_(False).eval()


def allocate(
    module: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    fp32_parameters: Sequence[str] = (),
    quantized: Mapping[str, WeightFormat] = {},
) -> None:
    """Give a module that lies on `meta` parameters on a device, not filled, in what `load_weights` keeps them in."""
    for name, parameter in list(module.named_parameters()):
        if name in quantized:
            _keep_in(_owner(module, name), quantized[name], device, name)
            continue
        keep = any(part in name for part in fp32_parameters)
        _replace(module, name, torch.empty(parameter.shape, device=device, dtype=torch.float32 if keep else dtype))


def check_keys(
    places: dict[str, Slot], shapes: dict[str, tuple[int, ...]], folder: Path, unexpected_keys: Sequence[str]
) -> None:
    """Raise one ValueError that names every key that is missing, left over or wrongly shaped."""
    missing = sorted(places.keys() - shapes.keys())
    left_over = sorted(key for key in shapes.keys() - places.keys() if not any(part in key for part in unexpected_keys))
    wrong = [
        f"{key} {list(shapes[key])}, expected {list(slot.shape)}"
        for key, slot in places.items()
        if key in shapes and not _fits(shapes[key], slot)
    ]
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", left_over), ("wrong shape", wrong))
        if keys
    ]
    if problems:
        raise ValueError(f"checkpoint {folder.name} does not fit its config; " + "; ".join(problems))


def _fits(shape: tuple[int, ...], slot: Slot) -> bool:
    """Equal, or a patch embedding's kernel [dim, C, p, q, r] for our [dim, C p q r]."""
    return shape == slot.shape or (
        shape[:1] == slot.shape[:1]
        and len(slot.shape) == 2
        and len(shape) > 2
        and math.prod(shape) == slot.num_elements
    )


def _some(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def weight_files(folder: Path, stem: str = WEIGHTS) -> list[Path]:
    """The folder's safetensors files: one, or the shards of its index. Raises ValueError where one is missing."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder.name}: no {single.name} and no {index.name} (pickled checkpoints are not read)")
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    paths = [folder / Path(shard).name for shard in shards]
    absent = [path.name for path in paths if not path.is_file()]
    if absent or not paths:
        raise ValueError(f"{folder.name}: {index.name} names files that are not there: {_some(absent)}")
    return paths


def tensor_headers(folder: Path, stem: str = WEIGHTS) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of a folder, from the files' headers alone."""
    for path in weight_files(folder, stem):
        with _open(path) as file:
            for key in file.keys():
                header = file.get_slice(key)
                yield key, tuple(header.get_shape()), str(header.get_dtype())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not readable JSON: {_unreadable(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.parent.name}/{path.name} must hold a JSON object")
    return value


def _unreadable(error: json.JSONDecodeError | UnicodeDecodeError | OSError) -> str:
    """Where it is wrong, without the parser's words."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}"
    return "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error.strerror or type(error).__name__)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not a readable safetensors file: {error}") from error


def _owner(module: nn.Module, name: str) -> Linear:
    layer = module.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, Linear)
    return layer


def _keep_in(layer: Linear, form: WeightFormat, device: torch.device, name: str) -> None:
    try:
        layer.keep_in(form, device)
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantised to {form.name}: {error}") from error


def _quantize(tensor: Tensor, layer: Linear, first: int, device: torch.device) -> None:
    """A checkpoint's tensor into its rows, some megabytes at a time; what is sent to the device is the file's bytes."""
    for start in range(0, len(tensor), QUANTIZED_ROWS):
        layer.fill(first + start, tensor[start : start + QUANTIZED_ROWS].to(device).float())


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
