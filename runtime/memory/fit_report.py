"""Tell which native sizes of a model fit on a device, in rows: for `models inspect` and the committed table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checkpoints.configs import parse_config
from ..checkpoints.registry import ModelFolder
from ..core.config import Settings
from ..core.device import HOST_SHARE, SHARE, cache_bytes
from ..families.wan.denoiser import WanConfig
from .fit import STAGES, Fitter, Needs, Size, longest_of, nearest_of
from .needs import needs_of
from .peaks import Peaks, predict_peaks
from .sizes import part_bytes, quantize_refusal

DEVICE_SHARE = SHARE["cuda"]  # the rest is the CUDA context, libraries' workspaces and fragments
DTYPE, DECODER_DTYPE = torch.bfloat16, torch.bfloat16


@dataclass(frozen=True)
class Precision:
    """A precision that a model is kept in, with the bytes of its parts and its peaks."""

    folder: ModelFolder
    quantize: str | None
    parts: Mapping[str, int]
    peaks: Peaks

    def needs(self, size: Size) -> Needs:
        return needs_of(self.folder, config_of(self.folder), size, DTYPE)

    def fitter(self, device_bytes: float, host_bytes: float | None, offload: str) -> Fitter:
        return Fitter(
            peaks=self.peaks,
            parts=self.parts,
            budget_bytes=int(DEVICE_SHARE * device_bytes),
            factor=self.folder.vae.get("scale_factor_spatial", 8),
            fixed_bytes=cache_bytes(torch.device("cuda"), Settings(memory_bytes=int(DEVICE_SHARE * device_bytes))),
            host_bytes=None if host_bytes is None else int(HOST_SHARE * host_bytes),
            offload=offload,
        )


@dataclass(frozen=True)
class Refusal:
    """A precision that a model cannot be kept in, and the reason."""

    folder: ModelFolder
    quantize: str | None
    why: str


def precisions(folder: ModelFolder, quantize: tuple[str | None, ...] = (None, "fp8")) -> Iterator[Precision | Refusal]:
    """Yield the checkpoint in bf16, its blocks' weights as they are, and in 8 bits where their sides allow it."""
    for kept_in in quantize:
        if (why := quantize_refusal(folder, kept_in)) is not None:
            yield Refusal(folder, kept_in, why)
            continue
        parts = part_bytes(folder, DTYPE, kept_in, DECODER_DTYPE)
        yield Precision(folder, kept_in, parts, predict_peaks(folder, DTYPE, kept_in, DECODER_DTYPE))


def config_of(folder: ModelFolder) -> WanConfig:
    """Return the experts' config."""
    name, fields = next(iter(folder.transformers.items()))
    return parse_config(WanConfig, fields, name)


def sizes_of(folder: ModelFolder) -> list[Size]:
    """Return the native sizes, at the default length."""
    return [Size(width, height, folder.defaults.num_frames) for width, height in folder.native_sizes]


def rows_of(
    precision: Precision | Refusal, device_bytes: float, host_bytes: float | None = None, offload: str = "auto"
) -> list[dict[str, Any]]:
    """Return one row a native size; docs/memory.md promises the keys.

    A refused precision has its rows as well: they are blocked by "quantize", and `why` names the weight.
    """
    if isinstance(precision, Refusal):
        return [_refused(precision, size, device_bytes) for size in sizes_of(precision.folder)]
    fitter = precision.fitter(device_bytes, host_bytes, offload)
    return [_row(precision, fitter, size) for size in sizes_of(precision.folder)]


def _row(precision: Precision, fitter: Fitter, size: Size) -> dict[str, Any]:
    def fits(other: Size) -> bool:
        return fitter.best(precision.needs(other)).fits

    fit, limits = fitter.best(precision.needs(size)), precision.folder.limits
    longest = longest_of(fits, size, limits)
    return {
        **asdict(size),
        "dtype": "bf16",
        "quantize": precision.quantize,
        "fits": fit.fits,
        "device_bytes": round(fit.budget_bytes / DEVICE_SHARE),
        "budget_bytes": fit.budget_bytes,
        "host_bytes": fit.host_bytes,
        "stages": fit.needs.stages,
        "peak_bytes": fit.peak_bytes,
        "resident": [part for part in precision.parts if part not in fit.way.moved],
        "moved": list(fit.way.moved),
        "guidance": fit.way.guidance,
        "decode_chunk": fit.way.chunk,
        "tiles": fit.way.tile(size),
        "overlaps": fit.overlaps,
        "blocked_by": fit.blocked_by,
        "nearest": [] if fit.fits else [str(other) for other in nearest_of(fits, size, limits)],
        "max_frames": longest.num_frames if longest else 0,
    }


def _refused(refusal: Refusal, size: Size, device_bytes: float) -> dict[str, Any]:
    return {
        **asdict(size),
        "dtype": "bf16",
        "quantize": refusal.quantize,
        "fits": False,
        "device_bytes": round(device_bytes),
        "budget_bytes": int(DEVICE_SHARE * device_bytes),
        "host_bytes": 0,
        "stages": [],
        "peak_bytes": dict.fromkeys(STAGES),
        "resident": [],
        "moved": [],
        "guidance": "together",
        "decode_chunk": 1,
        "tiles": None,
        "overlaps": False,
        "blocked_by": "quantize",
        "nearest": [],
        "max_frames": 0,
        "why": refusal.why,
    }
