"""Decide which parts of a model leave its device, from its configs, before a weight is read."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...kernels.toolchain import capability
from ..checkpoints.registry import ModelFolder
from ..core.config import Settings
from ..core.device import cache_bytes, host_bytes, memory_bytes
from ..memory.fit import Fitter
from ..memory.fit_report import config_of, sizes_of
from ..memory.needs import needs_of
from ..memory.peaks import CHUNKS, Peaks, measure_peaks, measure_workspace, predict_peaks, stored_peaks
from ..memory.sizes import part_bytes
from ..vae.tiling import Tiling

if TYPE_CHECKING:
    from .model import Model

logger = logging.getLogger(__name__)
OTHER_CAPABILITY = 90  # counts where there is no CUDA device: in tests, which move parts on a CPU


def place(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    decoder_dtype: torch.dtype,
    settings: Settings,
) -> tuple[str, ...]:
    """Return the parts that move, so that the largest native size that can fit does, at the least price.

    Where none fits, all parts that may move do: admission then takes smaller clips.
    """
    fitter = Fitter(
        peaks=_predicted(folder, device, dtype, quantize, decoder_dtype, settings),
        parts=part_bytes(folder, dtype, quantize, decoder_dtype),
        budget_bytes=memory_bytes(device, settings),
        factor=folder.vae.get("scale_factor_spatial", 8),
        fixed_bytes=cache_bytes(device, settings),
        host_bytes=host_bytes(),
        offload=settings.offload,
        chunks=chunks_of(settings),
        tilings=tilings_of(settings),
    )
    config = config_of(folder)
    sizes = sorted(sizes_of(folder), key=lambda size: -size.volume)
    needs = [needs_of(folder, config, size, dtype) for size in sizes]
    fits = (fitter.best(one) for one in needs)
    chosen = next((fit for fit in fits if fit.fits), None) or fitter.closest(needs[-1])
    if chosen.way.moved:
        names = ", ".join(chosen.way.moved)
        logger.info("%s leave the device while nothing needs them, so that %s fits", names, chosen.needs.size)
    return chosen.way.moved


def chunks_of(settings: Settings) -> tuple[int, ...]:
    """Return the numbers of latent frames that may be coded at a time."""
    return CHUNKS if settings.decode_chunk is None else (settings.decode_chunk,)


def tilings_of(settings: Settings) -> tuple[Tiling, ...]:
    """Return the tilings to choose from: as configured; for "auto", tiles for large frames or, at a price, for all."""
    chosen = Tiling.of(settings.tile)
    return (chosen, replace(chosen, threshold=0)) if settings.tile == "auto" else (chosen,)


def peaks_of(model: Model, settings: Settings) -> Peaks:
    """Return a loaded model's peaks: for CUDA predicted, plus the workspaces measured there; for a CPU measured."""
    device, codec, chunks = model.device, model.codec, chunks_of(settings)
    kept_in = "-".join(map(str, (model.fingerprint[:16], model.precision, codec.decoder_dtype, *chunks)))
    if device.type != "cuda":
        measure = partial(measure_peaks, model.folder, model.experts[0], codec, chunks)
        return stored_peaks(settings.profile_dir, f"{kept_in}-cpu", measure)
    peaks = _predicted(model.folder, device, model.dtype, model.quantize, codec.decoder_dtype, settings)
    name = f"{kept_in}-{torch.cuda.get_device_name(device)}"

    def workspace() -> Peaks:
        model.residency.require("transformer", "decoder")
        return replace(peaks, workspace=measure_workspace(model.experts[0], codec, peaks))

    return stored_peaks(settings.profile_dir, name, workspace)


def _predicted(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    decoder_dtype: torch.dtype,
    settings: Settings,
) -> Peaks:
    number = capability(device) if device.type == "cuda" else OTHER_CAPABILITY
    chunks = chunks_of(settings)
    configs = [folder.transformer, folder.vae, folder.encoders, *map(str, (dtype, quantize, decoder_dtype, chunks))]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:16]
    return stored_peaks(
        settings.profile_dir,
        f"{digest}-sm{number}",
        lambda: predict_peaks(folder, dtype, quantize, decoder_dtype, capability=number, chunks=chunks),
    )
