"""Load safetensors checkpoints in diffusers' folder format into modules, streamed to their device and dtype.

The module is built on the `meta` device; every file's header is read and every key checked before any weight is. Then
one tensor at a time goes from the file to its place, so no second copy of the weights ever exists.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...kernels.weight_formats import WeightFormat
from ..core.json_file import check_no_pointer, read_json, shown
from ..layers.linear import Linear

WEIGHTS = "diffusion_pytorch_model"  # diffusers' stem of weight files
ENCODER_WEIGHTS = "model"  # transformers'
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Files of weights that nothing here reads: pickles run code, the others need their own arithmetic.
FOREIGN = {".bin": "a pickle", ".pt": "a pickle", ".pth": "a pickle", ".ckpt": "a pickle", ".gguf": "GGUF"}
QUANTIZED_ROWS = 1024  # at a time: 56 MB of fp32 of Wan 14B's widest


logger = logging.getLogger(__name__)
Header = tuple[tuple[int, ...], str]  # of a tensor: its shape, and its dtype as safetensors names it


@dataclass(frozen=True)
class Slot:
    """The place that a checkpoint's tensor goes to: rows of one parameter.

    kernel: the tensor's shape in the file if it is a convolution's there, [out, C, p, q, r] for [out, C p q r].
    """

    parameter: str
    rows: slice
    num_elements: int
    shape: tuple[int, ...]
    kernel: tuple[int, ...] | None = None


def slots(module: nn.Module, rename: Callable[[str], str] = lambda name: name) -> dict[str, Slot]:
    """Return checkpoint name -> slot, for every parameter; a fused `Linear` has one for each of its sources.

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
            kernel = (num_rows, *fused[owner].kernel) if fused[owner].kernel and leaf == "weight" else None
            places[rename(key)] = Slot(name, slice(start, start + num_rows), math.prod(shape), shape, kernel)
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
        headers = {key: _header(file, key) for key, (_, file) in where.items()}
        check_keys(places, headers, folder, unexpected_keys)
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
    places: Mapping[str, Slot],
    headers: Mapping[str, Header],
    folder: Path,
    unexpected_keys: Sequence[str],
) -> None:
    """Raise one ValueError that names every key that is missing, left over, wrongly shaped or no float.

    Keys that `unexpected_keys` let pass are logged.
    """
    missing = sorted(places.keys() - headers.keys())
    extra = sorted(headers.keys() - places.keys())
    left_over = [key for key in extra if not any(part in key for part in unexpected_keys)]
    wrong, integers = [], []
    for key, slot in places.items():
        if key not in headers:
            continue
        shape, dtype = headers[key]
        if shape not in (slot.shape, slot.kernel):
            wrong.append(f"{key} {list(shape)}, expected {list(slot.kernel or slot.shape)}")
        if dtype not in FLOATS:
            integers.append(f"{key} {dtype}")
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", left_over),
            ("wrong shape", wrong),
            ("not floating-point", integers),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"checkpoint {folder.name} does not fit its config; " + "; ".join(problems))
    if extra:
        logger.info("%s: weights that nothing uses are left out: %s", folder.name, _some(extra))


def _some(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def weight_files(folder: Path, stem: str = WEIGHTS) -> list[Path]:
    """Return the folder's safetensors files: one, or the shards of its index. Raises ValueError where one is missing.

    Where there is both, diffusers' weights are taken from the index and transformers' from the single file, as they do.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and not (stem == WEIGHTS and index.is_file()):
        return [single]
    if not index.is_file():
        raise ValueError(_no_weights(folder, stem))
    name = f"{folder.name}/{index.name}"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) and shard for shard in weight_map.values()):
        raise ValueError(f"{name}: weight_map must be an object of tensors' names and files, got {shown(weight_map)}")
    if not weight_map:
        raise ValueError(f"{name}: weight_map names no file")
    shards = sorted(set(weight_map.values()))
    if elsewhere := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{name}: weight_map must name files of its own folder, got {shown(elsewhere[0])}")
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{folder.name}: {index.name} names files that are not there: {_some(absent)}")
    return [folder / shard for shard in shards]


def _no_weights(folder: Path, stem: str) -> str:
    """Return the refusal of a folder without weights, with what to do about what is there instead."""
    wanted = f"{stem}.safetensors"
    there = sorted(path.name for path in folder.glob("*") if path.is_file())
    told = f"{folder.name}: no {wanted} and no {wanted}.index.json"
    # STEM.VARIANT.safetensors; indices are called STEM.safetensors.index.VARIANT.json by diffusers, the other by others
    variant = rf"{stem}\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors(?:\.index\.json)?)"
    for name in there:
        if found := re.fullmatch(variant, name):
            whole = f"{wanted}.index.json" if name.endswith(".json") else wanted
            told += f", only the variant {found[1] or found[2]}, which is not taken by itself"
            return f"{told}: rename {name} to {whole}"
    for name in there:
        if kind := FOREIGN.get(Path(name).suffix):
            advice = "convert it to safetensors" if kind == "a pickle" else "get the safetensors files"
            refused = "pickled checkpoints are not read" if kind == "a pickle" else f"{kind} is not read"
            return f"{told}, but {name} ({refused}: {advice})"
    others = [name for name in there if name.endswith(".safetensors")]
    return f"{told}; the weights there have other names: {_some(others)}" if others else f"{told}: it holds no weights"


def has_weights(folder: Path) -> bool:
    """Return whether a part's folder holds weights in any form, rather than JSON alone."""
    return any(path.suffix in (".safetensors", *FOREIGN) for path in folder.glob("*"))


def tensor_headers(folder: Path, stem: str = WEIGHTS) -> dict[str, Header]:
    """Return name -> (shape, dtype) of every tensor of a folder, from the files' headers alone."""
    headers: dict[str, Header] = {}
    for path in weight_files(folder, stem):
        with _open(path) as file:
            headers |= {key: _header(file, key) for key in file.keys()}
    return headers


def _header(file: Any, key: str) -> Header:
    header = file.get_slice(key)
    return tuple(header.get_shape()), str(header.get_dtype())


def _open(path: Path) -> Any:
    check_no_pointer(path, f"{path.parent.name}/{path.name}")
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
    """Quantise a tensor into its rows, some megabytes at a time; the file's own bytes are sent to the device."""
    for start in range(0, len(tensor), QUANTIZED_ROWS):
        layer.fill(first + start, tensor[start : start + QUANTIZED_ROWS].to(device).float())


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
