"""The halves of a VAE as the backends of `compile` see them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...compile.attention import ANY_AREA
from ...compile.stream import Coder, States
from .wan import WanVAE


def move(module: nn.Module, device: torch.device) -> None:
    """Bring a module's weights to a device, for all who share its parts."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if weight.device.type != device.type or device.index not in (None, weight.device.index):
                moved = weight.detach().to(device)  # set anew: a fake tensor's data cannot change its device
                is_weight = isinstance(weight, nn.Parameter)
                setattr(part, name, nn.Parameter(moved, weight.requires_grad) if is_weight else moved)


class WanDecoder(nn.Module):
    """The decoder's weights alone, shared with the VAE's."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.config, self.post_quant_conv, self.decoder = vae.config, vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor, states: States | None) -> tuple[Tensor, States]:
        return WanVAE.decode_chunk(self, latents, states)  # type: ignore[arg-type]


class WanEncoder(nn.Module):
    """The encoder's. Of the posterior's moments it gives the means: nothing else is used of them."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.config, self.quant_conv, self.encoder = vae.config, vae.quant_conv, vae.encoder

    def forward(self, frames: Tensor, states: States | None) -> tuple[Tensor, States]:
        moments, states = WanVAE.encode_chunk(self, frames, states)  # type: ignore[arg-type]
        return moments.chunk(2, dim=1)[0], states


def decoder_of(vae: WanVAE) -> Coder:
    """Latents, not normalised, to frames."""
    config = vae.config
    return Coder(
        kind="decoder",
        module=WanDecoder(vae),
        in_channels=config.z_dim,
        out_channels=3,
        in_scale=1,
        out_scale=config.scale_factor_spatial,
        in_frames=1,
        out_frames=config.scale_factor_temporal,
        max_any_area=ANY_AREA,
    )


def encoder_of(vae: WanVAE) -> Coder:
    """Frames to the posterior's means, not normalised."""
    config = vae.config
    return Coder(
        kind="encoder",
        module=WanEncoder(vae),
        in_channels=3,
        out_channels=config.z_dim,
        in_scale=config.scale_factor_spatial,
        out_scale=1,
        in_frames=config.scale_factor_temporal,
        out_frames=1,
        max_any_area=ANY_AREA,
    )
