"""A checkpoint in memory: text encoder, one or two experts, VAE, and what its folder says of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ..cache.calibration import CalibrationFile
from ..cache.spec import WAN_PRESETS
from ..cache.teacache import PUBLISHED
from ..checkpoints.hub import resolve_folder
from ..checkpoints.registry import EXPERTS, ModelFolder, read_folder
from ..core.config import Settings
from ..core.fingerprint import fingerprint
from ..core.request import ModelDefaults, ModelLimits
from ..families.wan.denoiser import WanDenoiser
from ..sampler.config import SolverConfig
from ..vae.codec import VideoCodec, decoder_dtype
from ..vae.tiling import Tiling
from ..vae.wan import WanVAE
from .image_encoder import ImageEncoder
from .loadable import check_loadable
from .parts import expert_part, load_part, vae_part
from .placement import place
from .residency import CudaMover, Mover, Residency
from .text_encoder import TextEncoder


@dataclass(frozen=True)
class Model:
    """Everything that requests for one checkpoint share."""

    name: str
    folder: ModelFolder
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None
    experts: tuple[WanDenoiser, ...]
    codec: VideoCodec
    solver: SolverConfig
    defaults: ModelDefaults
    limits: ModelLimits
    device: torch.device
    dtype: torch.dtype
    calibrations: CalibrationFile
    quantize: str | None = None  # "fp8" or "int8": what the weights of the blocks are kept in
    residency: Residency = dataclasses.field(default_factory=Residency)

    @property
    def precision(self) -> str:
        """What results depend on beside the weights: "bfloat16", or "bfloat16+fp8"."""
        return "+".join(filter(None, (str(self.dtype).removeprefix("torch."), self.quantize)))

    @property
    def cache_presets(self) -> dict[str, str]:
        """Preset -> policy."""
        return WAN_PRESETS | self.folder.cache_presets

    @property
    def teacache_coefficients(self) -> tuple[float, ...]:
        """Of the checkpoint's card, or published for a model of its size; empty where nobody has fitted any."""
        given = self.folder.extra.get("teacache")
        config = self.experts[0].config
        published = {} if self.folder.concatenates_image else PUBLISHED
        return tuple(given) if given else published.get((config.num_layers, config.dim), ())

    @property
    def is_distilled(self) -> bool:
        """Whether the checkpoint was trained to need few steps, of which none can be skipped."""
        return bool(self.folder.extra.get("distilled"))

    def expert_at(self, timestep: float) -> int:
        """Which expert denoises at this timestep: the second below the boundary, where there are two."""
        boundary = self.folder.boundary_timestep
        return int(boundary is not None and timestep < boundary and len(self.experts) > 1)

    @cached_property
    def fingerprint(self) -> str:
        """Of every component as its folder had it; see `fingerprint`."""
        return fingerprint(self.folder.path)

    @property
    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """What can be on the device by itself: encoders, experts, and the halves of the VAE."""
        images = {} if self.image_encoder is None else {"image_encoder": (self.image_encoder.model,)}
        return {
            "text_encoder": (self.text_encoder.model,),
            **images,
            **{name: (expert,) for name, expert in zip(EXPERTS, self.experts, strict=False)},
            "encoder": (self.codec.encoder,),
            "decoder": (self.codec.decoder,),
        }

    @property
    def part_bytes(self) -> dict[str, int]:
        return {
            name: sum(p.nbytes for module in modules for p in module.parameters())
            for name, modules in self.parts.items()
        }

    @property
    def num_bytes(self) -> int:
        return sum(self.part_bytes.values())


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    cache_dir: Path | None = None,
    quantize: str | None = None,
    mover: Mover | None = None,
    revision: str | None = None,
) -> Model:
    """Load a model by name; ValueError names the model, the component and the key that do not fit.

    quantize: "fp8" or "int8" for the weights of the denoiser's blocks; see `quantization`. mover: what moves parts that
    do not stay on the device; by default CUDA's on CUDA, and on a CPU nothing moves. revision: of a hub's model.
    The VAE encodes in fp32 whatever `dtype` is: in bf16 a given image is visibly another. What it decodes in is the
    settings' affair.
    """
    path = resolve_folder(name, cache_dir or settings.cache_dir, revision)
    folder = read_folder(path, name)
    try:
        return _load_folder(name, folder, device, dtype, settings, quantize, mover)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from error


def _load_folder(
    name: str,
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    quantize: str | None,
    mover: Mover | None,
) -> Model:
    path, companions = folder.path, check_loadable(folder)  # before the first weight is read, which takes minutes
    if mover is None and device.type == "cuda" and settings.offload != "none":
        mover = CudaMover(device)
    if mover is None and settings.offload == "all":
        raise ValueError(f"offload all needs a CUDA device, and this is {device}: nothing can be moved off it")
    moved = (
        ()
        if mover is None
        else place(folder, device, dtype, quantize, decoder_dtype(settings.decoder_dtype, device), settings)
    )
    at = {part: torch.device("cpu") if part in moved else device for part in (*folder.transformers, *folder.encoders)}
    text, image = folder.encoders["text_encoder"], folder.encoders.get("image_encoder")
    experts = tuple(
        load_part(expert_part(part, config), path / part, device=at[part], dtype=dtype, quantize=quantize)
        for part, config in folder.transformers.items()
    )
    solver = SolverConfig.from_diffusers(folder.scheduler)
    model = Model(
        name=name,
        folder=folder,
        text_encoder=TextEncoder.load(
            path,
            device=at["text_encoder"],
            dtype=dtype,
            max_tokens=folder.limits.max_prompt_tokens,
            fields=text,
            tokenizer=companions.tokenizer,
        ),
        image_encoder=None
        if image is None
        else ImageEncoder.load(
            path, device=at["image_encoder"], dtype=torch.float32, fields=image, processor=companions.processor
        ),
        experts=cast(tuple[WanDenoiser, ...], experts),
        codec=load_codec(folder, device, settings),
        solver=solver,
        defaults=dataclasses.replace(folder.defaults, solver=solver.solver, shift=solver.shift),
        limits=folder.limits,
        device=device,
        dtype=dtype,
        calibrations=companions.calibrations.serving(quantize),
        quantize=quantize,
        residency=Residency(settings.offload if mover else "none", mover),
    )
    for part in moved:
        model.residency.add(part, *model.parts[part])
    model.codec.require = model.residency.require
    return model


def load_codec(folder: ModelFolder, device: torch.device, settings: Settings) -> VideoCodec:
    """The VAE alone: it encodes in fp32, and decodes as the settings say."""
    dtype = decoder_dtype(settings.decoder_dtype, device)
    vae = load_part(
        vae_part(folder.vae),
        folder.path / "vae",
        device=device if dtype == torch.float32 else torch.device("cpu"),
        dtype=torch.float32,
    )
    return VideoCodec(
        cast(WanVAE, vae),
        device=device,
        chunk=settings.decode_chunk,
        tiling=Tiling.of(settings.tile),
        decoder_dtype=dtype,
    )
