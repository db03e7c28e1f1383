"""Wan's causal video VAE (2.1 and 2.2) as streaming functions with explicit state.

Shape letters: B clips, C channels, T frames (or latent frames), H height, W width. Video tensors are [B, C, T, H, W],
kept in channels-last memory order, in which folding T into B for 2-D layers costs nothing.

Source: Wan (arXiv 2503.20314, section 4.1). Every convolution over time is causal, so a clip may be cut anywhere
between latent frames: what a chunk needs of the chunks before it is the last two input frames of each temporal
convolution. Those are the state. The first chunk (one latent frame, one frame) differs from all later ones (four
frames a latent frame), which makes exactly two graphs: `first` (no state in) and `next`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compile.stream import States, owned
from ...kernels.conv3d import conv3d
from ...kernels.resample_conv import downsample_conv2d, upsample_conv2d
from .pixels import average_down, fold_time, interleave_time, patchify, repeat_up, unfold_time, unpatchify
from .wan_config import WanVAEConfig as WanVAEConfig


class Stream:
    """One pass over a chunk: hands each temporal layer its state of the chunk before and collects the new states.

    It empties the list that it is given. A state is freed as soon as its layer has read it, and a new one owns its
    bytes alone: never do two generations live at once, and none keeps a layer's input.
    """

    def __init__(self, states: States | None) -> None:
        self.first = states is None
        self._past: States = [] if states is None else states
        self.states: States = []

    def extend(self, x: Tensor, num_frames: int) -> Tensor:
        """`x` with the `num_frames` frames before it in front (zeros before the first chunk)."""
        past = zero_frames(x, num_frames) if self.first else self._past.pop(0)
        x = torch.cat((past, x), dim=2)
        del past
        self.remember(x[:, :, -num_frames:])
        return x

    def remember(self, state: Tensor) -> None:
        """Store a new state."""
        self.states.append(owned(state))


def zero_frames(like: Tensor, num_frames: int) -> Tensor:
    """Zeros [B, C, num_frames, H, W] in channels-last order, or what they are joined to would lose it."""
    b, c, _, h, w = like.shape
    return like.new_zeros(b, num_frames, h, w, c).movedim(-1, 1)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees the present and the two frames before it.

    In two parts, so that who calls them one after the other keeps nothing that the second one does not need.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        x = self.extend(x, stream)
        return self.convolve(x, stream)

    def extend(self, x: Tensor, stream: Stream) -> Tensor:
        """`x` with the frames before it; the last of them are the next chunk's."""
        num_past = self.kernel_size[0] - 1
        if not num_past:
            return x
        if self._is_lone(x, stream):
            stream.remember(F.pad(x, (0, 0, 0, 0, num_past - 1, 0)))
            return x
        return stream.extend(x, num_past)

    def convolve(self, x: Tensor, stream: Stream) -> Tensor:
        """Of what `extend` gives."""
        # Before a lone first frame lie zeros: only the kernel's last tap counts.
        weight = self.weight[:, :, -1:] if self._is_lone(x, stream) else self.weight
        return conv3d(x, weight, self.bias, padding=(0, self.kernel_size[1] // 2, self.kernel_size[2] // 2))

    def _is_lone(self, x: Tensor, stream: Stream) -> bool:
        return self.kernel_size[0] > 1 and stream.first and x.shape[2] == 1


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels, in fp32."""

    def __init__(self, dim: int, num_trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *([1] * num_trailing)))

    def forward(self, x: Tensor) -> Tensor:
        # F.normalize's clamp (norm >= 1e-12) against all-zero pixels, written as an epsilon on the mean square.
        channels_last = x.movedim(1, -1)
        weight = self.gamma.flatten().to(x.dtype)
        return F.rms_norm(channels_last, (x.shape[1],), weight, 1e-24).movedim(-1, 1)


def norm_silu(norm: RMSNorm, x: Tensor) -> Tensor:
    y = norm(x)
    return F.silu(y, inplace=not y.requires_grad)


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of y, which nobody else may hold. A graph writes into nothing."""
    return x + y if torch.compiler.is_exporting() else y.add_(x)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim, 3)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim, 3)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = norm_silu(self.norm1, x)  # one name for all that comes of it: each is freed as the next is there
        y = self.conv1.extend(y, stream)
        y = self.conv1.convolve(y, stream)
        y = norm_silu(self.norm2, y)
        y = self.conv2.extend(y, stream)
        y = self.conv2.convolve(y, stream)
        return plus(x if self.conv_shortcut is None else self.conv_shortcut(x, stream), y)


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        del stream  # frames do not see each other here
        b, _, _, h, w = x.shape
        frames = fold_time(x)
        tokens = self.norm(frames).movedim(1, -1).flatten(1, 2)  # [BT, HW, C]
        q, k, v = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = F.linear(out, self.proj.weight.flatten(1), self.proj.bias)
        return x + unfold_time(out.unflatten(1, (h, w)).movedim(-1, 1), b)


class Downsample(nn.Module):
    """Halves height and width, and the frames after the first one where `temporal`."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Conv2d(dim, dim, 3, stride=2)
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        assert self.resample.bias is not None
        y = unfold_time(downsample_conv2d(fold_time(x), self.resample.weight, self.resample.bias), x.shape[0])
        if self.time_conv is None:
            return y
        if stream.first:
            stream.remember(y[:, :, -1:])
            return y
        return conv3d(stream.extend(y, 1), self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1))


class Upsample(nn.Module):
    """Doubles height and width, and the frames after the first one where `temporal`."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Conv2d(dim, out_dim, 3, padding=1)
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            if stream.first:  # the lone first frame is not doubled, and what follows sees zeros in its place
                stream.remember(zero_frames(x, 2))
            else:
                x = interleave_time(conv3d(stream.extend(x, 2), self.time_conv.weight, self.time_conv.bias))
        assert self.resample.bias is not None
        # nearest equals the checkpoints' nearest-exact at factor 2
        return unfold_time(upsample_conv2d(fold_time(x), self.resample.weight, self.resample.bias), x.shape[0])


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        x = self.attentions[0](x, stream)
        return self.resnets[1](x, stream)


class ResidualDownBlock(nn.Module):
    """Wan2.2: residual blocks and downsampling beside a parameter-free shortcut that averages pixels into channels."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, temporal: bool, spatial: bool) -> None:
        super().__init__()
        self.factors = (2 if temporal else 1, 2 if spatial else 1)
        self.out_dim = out_dim
        self.resnets = nn.ModuleList(ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_blocks))
        self.downsampler = Downsample(out_dim, temporal) if spatial else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        past = self.factors[0] - 1 if stream.first else 0  # the lone first frame stands for a whole group, behind zeros
        shortcut = average_down(F.pad(x, (0, 0, 0, 0, past, 0)), self.out_dim, *self.factors)
        for block in self.resnets:
            x = block(x, stream)
        if self.downsampler is not None:
            x = self.downsampler(x, stream)
        return x + shortcut


class ResidualUpBlock(nn.Module):
    """Wan2.2: residual blocks and upsampling beside a parameter-free shortcut that repeats channels into pixels."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, temporal: bool, spatial: bool) -> None:
        super().__init__()
        self.factors = (2 if temporal else 1, 2)
        self.out_dim = out_dim
        self.resnets = nn.ModuleList(ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_blocks))
        self.upsampler = Upsample(out_dim, out_dim, temporal) if spatial else None

    @property
    def layers(self) -> Iterable[nn.Module]:
        """What is done one after the other."""
        return self.resnets if self.upsampler is None else (self,)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        assert self.upsampler is not None
        y = x
        for block in self.resnets:
            y = block(y, stream)
        y = self.upsampler(y, stream)
        shortcut = repeat_up(x, self.out_dim, *self.factors)
        return plus(shortcut[:, :, self.factors[0] - 1 :] if stream.first else shortcut, y)


class UpBlock(nn.Module):
    """Wan2.1: residual blocks, then upsampling that halves the channels."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, temporal: bool, spatial: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_blocks))
        self.upsamplers = nn.ModuleList([Upsample(out_dim, out_dim // 2, temporal)]) if spatial else None

    @property
    def layers(self) -> Iterable[nn.Module]:
        """What is done one after the other."""
        return self.resnets if self.upsamplers is None else (*self.resnets, *self.upsamplers)


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], 3)
        self.down_blocks = nn.ModuleList(_down_blocks(config, dims))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        x = norm_silu(self.norm_out, x)
        x = self.conv_out.extend(x, stream)
        return self.conv_out.convolve(x, stream)


def _down_blocks(config: WanVAEConfig, dims: list[int]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
        spatial = level != len(config.dim_mult) - 1
        temporal = spatial and config.temperal_downsample[level]
        if config.is_residual:
            blocks.append(ResidualDownBlock(in_dim, out_dim, config.num_res_blocks, temporal, spatial))
            continue
        blocks += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(config.num_res_blocks)]
        if spatial:
            blocks.append(Downsample(out_dim, temporal))
    return blocks


class Decoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        base_dim = config.decoder_base_dim or config.base_dim
        mult = list(config.dim_mult)[::-1]
        dims = [base_dim * m for m in (mult[0], *mult)]
        temporal_upsample = list(config.temperal_downsample)[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            spatial = level != len(mult) - 1
            temporal = spatial and temporal_upsample[level]
            if config.is_residual:
                block: nn.Module = ResidualUpBlock(in_dim, out_dim, config.num_res_blocks + 1, temporal, spatial)
            else:
                in_dim = in_dim // 2 if level > 0 else in_dim
                block = UpBlock(in_dim, out_dim, config.num_res_blocks + 1, temporal, spatial)
            self.up_blocks.append(block)
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        x = self.mid_block(x, stream)
        # Layer by layer, not block by block: a call keeps its arguments until it returns.
        for block in self.up_blocks:
            assert isinstance(block, UpBlock | ResidualUpBlock)
            for layer in block.layers:
                x = layer(x, stream)
        x = norm_silu(self.norm_out, x)
        x = self.conv_out.extend(x, stream)
        return self.conv_out.convolve(x, stream)


class WanVAE(nn.Module):
    """Encoder and decoder as pure functions of a chunk and the state of the chunks before it."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode_chunk(self, frames: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Posterior moments of a chunk.

        frames: [B, 3, 1, H, W] first (`states` None), then [B, 3, 4n, H, W]; values in [-1, 1].
        Returns [B, 2 * z_dim, n, H / s, W / s] (mean, log variance) and the states for the next chunk.
        """
        stream = Stream(states)
        x = patchify(frames, self.config.patch_size or 1)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.quant_conv(self.encoder(x, stream), stream), stream.states

    def decode_chunk(self, latents: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Frames of a chunk.

        latents: [B, z_dim, 1, h, w] first (`states` None), then [B, z_dim, n, h, w]; not normalised.
        Returns [B, 3, 1 or 4n, H, W], not clamped, and the states for the next chunk.
        """
        stream = Stream(states)
        x = latents.contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.post_quant_conv(x, stream), stream)
        return unpatchify(x, self.config.patch_size or 1), stream.states


def checkpoint_name(parameter: str) -> str:
    """The checkpoint's name of one of our parameters: it counts a padding layer before each resampling convolution."""
    return parameter.replace(".resample.", ".resample.1.")
