"""The config of Wan's VAE, and the values that it may have; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.json_file import shown, within

# Of Wan 2.1's latents: what diffusers takes where a config.json does not say.
MEAN_21 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD_21 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
)


@dataclass(frozen=True)
class WanVAEConfig:
    """The fields of diffusers' `AutoencoderKLWan` config.json that shape the network.

    ValueError names the first one that is out of bounds or does not go with the others.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)  # the checkpoints' own spelling
    latents_mean: Sequence[float] = MEAN_21
    latents_std: Sequence[float] = STD_21
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        within(self, 1, 4096, "base_dim", "decoder_base_dim")
        within(self, 1, 1024, "z_dim")
        within(self, 0, 16, "num_res_blocks")
        within(self, 1, 16, "patch_size")
        if not 1 <= len(self.dim_mult) <= 8 or not all(1 <= mult <= 64 for mult in self.dim_mult):
            raise ValueError(f"dim_mult must be 1 to 8 numbers from 1 to 64, got {list(self.dim_mult)}")
        if self.attn_scales:  # no published checkpoint has them, and the reference itself cannot run them
            raise ValueError(f"attn_scales must be empty, got {list(self.attn_scales)}")

    def check(self) -> None:
        """ValueError for fields of a checkpoint that do not go together; a network of its own needs less."""
        within(self, 1, 16, "num_res_blocks")
        for name in ("latents_mean", "latents_std"):
            if (length := len(getattr(self, name))) != self.z_dim:
                raise ValueError(f"{name} must have z_dim = {self.z_dim} values, got {length}")
        if not all(std > 0 for std in self.latents_std):
            raise ValueError(f"latents_std must be above 0, got {min(self.latents_std)}")
        self._check_factors()

    def _check_factors(self) -> None:
        """Check against the layers: they tell how many pixels and frames one latent stands for."""
        levels, patch = len(self.dim_mult), self.patch_size or 1
        if len(self.temperal_downsample) != levels - 1:
            count = f"{levels - 1} values, one less than dim_mult"
            raise ValueError(f"temperal_downsample must have {count}, got {shown(list(self.temperal_downsample))}")
        for name, wanted in (
            ("in_channels", 3 * patch**2),
            ("out_channels", 3 * patch**2),
            ("scale_factor_spatial", patch * 2 ** (levels - 1)),
            ("scale_factor_temporal", 2 ** sum(self.temperal_downsample)),
        ):
            if getattr(self, name) != wanted:
                others = "dim_mult, temperal_downsample and patch_size"
                raise ValueError(f"{name} must be {wanted} with these {others}, got {getattr(self, name)}")
        if self.is_residual:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Check that Wan2.2's shortcuts can fold pixels into whole groups of channels, and unfold them."""
        mult, temporal = list(self.dim_mult), list(self.temperal_downsample)
        folded = [4 * (1 + doubles) for doubles in temporal]  # pixels of a level
        down = [self.base_dim * m for m in (1, *mult)]
        up = [(self.decoder_base_dim or self.base_dim) * m for m in (mult[-1], *mult[::-1])]
        encodes = all(a * pixels % b == 0 for (a, b), pixels in zip(pairwise(down), (*folded, 1), strict=True))
        decodes = all(
            b % a == 0 or (a % b == 0 and pixels % (a // b) == 0)
            for (a, b), pixels in zip(pairwise(up[:-1]), folded[::-1], strict=True)
        )
        if not (encodes and decodes):
            raise ValueError(f"dim_mult must let channels fold evenly from level to level, got {mult}")
