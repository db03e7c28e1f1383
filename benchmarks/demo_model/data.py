"""Draw the denoiser's training data: encoded clips of several sizes, the frames that are given, and captions.

Shape letters: B clips, C latent channels, T latent frames, F frames.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...runtime.checkpoints.configs import parse_config
from ...runtime.checkpoints.weights import load_weights
from ...runtime.core.json_file import read_json
from ...runtime.vae.wan import WanVAE, WanVAEConfig, checkpoint_name
from .scenes import Scenes, caption, draw_scenes, render
from .text import FILLERS


@dataclass(frozen=True)
class Bucket:
    """Clips of one size, with their number a step and their share of the steps."""

    num_frames: int
    height: int
    width: int
    batch: int
    weight: float
    stock: int  # encoded clips at hand
    fresh: int = 8  # of them replaced at every second visit


# Stills teach which word draws what at a fifth of a clip's tokens; clips teach to keep it over time.
BUCKETS = (
    Bucket(1, 64, 64, 256, 0.24, 12288, 64),
    Bucket(17, 64, 64, 64, 0.54, 4096),
    Bucket(17, 64, 96, 40, 0.07, 768),
    Bucket(17, 96, 64, 40, 0.07, 768),
    Bucket(33, 64, 64, 32, 0.05, 512),
    Bucket(9, 64, 64, 64, 0.03, 256),
)


class Stock:
    """A rolling set of encoded clips of one bucket."""

    def __init__(self, bucket: Bucket, vae: WanVAE, scale: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
        self.bucket, self.vae, self.generator = bucket, vae, generator
        self.mean, self.std = scale
        self.latents: list[Tensor] = []  # [C, T, H, W] bf16
        self.lone_last: list[Tensor] = []  # [C, 1, H, W]: the last frame encoded alone
        self.labels: list[dict[str, str]] = []

    def refill(self, count: int) -> None:
        """Encode `count` new clips; the oldest leave once the stock is full."""
        b = self.bucket
        scenes: Scenes = draw_scenes(count, self.generator)
        frames, _ = render(scenes, b.num_frames, b.height, b.width)
        frames = frames.to(self.mean.device)
        with torch.no_grad(), torch.autocast(frames.device.type, torch.bfloat16):
            latents, lone = (
                self._normalise(x) for x in (encode(self.vae, frames), encode(self.vae, frames[:, :, -1:]))
            )
        self.latents = (self.latents + list(latents))[-b.stock :]
        self.lone_last = (self.lone_last + list(lone))[-b.stock :]
        self.labels = (self.labels + [scenes.labels(i) for i in range(count)])[-b.stock :]

    def draw(self) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        picks = torch.randint(len(self.labels), (self.bucket.batch,), generator=self.generator).tolist()
        latents = torch.stack([self.latents[i] for i in picks]).float()
        return latents, torch.stack([self.lone_last[i] for i in picks]).float(), [self.labels[i] for i in picks]

    def _normalise(self, latents: Tensor) -> Tensor:
        return ((latents.float() - self.mean) / self.std).bfloat16().cpu()


def encode(vae: WanVAE, frames: Tensor) -> Tensor:
    """Return posterior means [B, C, T, H, W] of frames [B, 3, F, H, W]; a lone frame is a clip of one."""
    moments, states = vae.encode_chunk(frames[:, :, :1])
    if frames.shape[2] > 1:
        moments = torch.cat((moments, vae.encode_chunk(frames[:, :, 1:], states)[0]), dim=2)
    return moments.chunk(2, dim=1)[0]


def draw_given(batch: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (given [B, T] bool, lone_last [B] bool): half of the clips give nothing, the others some of their frames."""
    given = torch.zeros(batch, frames, dtype=torch.bool)
    if frames == 1:
        return given, given[:, 0]
    kind = torch.rand(batch, generator=generator)
    prefix = 1 + torch.randint(max(frames - 2, 1), (batch,), generator=generator)
    first = (kind >= 0.5) & (kind < 0.70)
    last = (kind >= 0.70) & (kind < 0.78)
    both = (kind >= 0.78) & (kind < 0.88)
    given[:, 0] = first | both
    given[:, -1] = last | both
    given |= (kind >= 0.88)[:, None] & (torch.arange(frames) < prefix[:, None])
    return given, last | both


def draw_caption(labels: dict[str, str], generator: torch.Generator) -> str:
    """Draw a caption; a tenth are empty (for guidance), some carry words that mean nothing."""
    chance = torch.rand(3, generator=generator).tolist()
    if chance[0] < 0.1:
        return ""
    words = caption(labels, generator).split()
    if chance[1] < 0.15:
        filler = (*FILLERS, "zzz")[int(chance[2] * (len(FILLERS) + 1))]
        words.insert(int(chance[2] * 977) % (len(words) + 1), filler)
    return " ".join(words)


Scale = tuple[Tensor, Tensor]  # the latents' mean and standard deviation per channel, each [C, 1, 1, 1]


def load_frozen_vae(folder: Path, device: torch.device) -> tuple[WanVAE, Scale]:
    """Load the VAE of a training run (its averaged weights) or of a diffusers folder, and its latents' statistics."""
    shape = (-1, 1, 1, 1)
    if not (folder / "state.safetensors").exists():
        config = parse_config(WanVAEConfig, read_json(folder / "config.json"), "vae")
        with torch.device("meta"):
            vae = WanVAE(config)
        load_weights(vae, folder, device=device, dtype=torch.float32, rename=checkpoint_name)
        mean, std = (torch.tensor(list(values), device=device) for values in (config.latents_mean, config.latents_std))
        return vae, (mean.view(shape), std.view(shape))
    vae = WanVAE(WanVAEConfig(**json.loads((folder / "config.json").read_text()))).to(device)
    tensors = load_file(folder / "state.safetensors")
    vae.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("average.")})
    vae.eval().requires_grad_(False)
    frames, _ = render(draw_scenes(96, torch.Generator().manual_seed(11)), 17, 64, 64)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        latents = encode(vae, frames.to(device)).float()
    return vae, (latents.mean(dim=(0, 2, 3, 4)).view(shape), latents.std(dim=(0, 2, 3, 4)).view(shape))
