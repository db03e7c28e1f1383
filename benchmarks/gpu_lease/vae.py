"""Call 5: Wan's VAEs at real width with random weights: seconds, peak bytes, bf16's error, channels-last, TF32.

A decoder and an encoder reach their peaks in the third chunk, so clips are as long as that takes; seconds are of a
latent frame behind the first one.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...runtime.vae.codec import VideoCodec
from ...runtime.vae.wan import WanVAEConfig
from ..harness import Run
from ..peak import held_bytes, peak_while
from .case import Case, Context
from .claims import tf32
from .drive import main
from .lines import Labels, Line, Note, measured, of_turns
from .random_weights import VAE_21, VAE_22, vae

CHUNKS = (1, 4)
STEADY = 3  # chunks behind the first frame: the peak is that of all later ones


@dataclass(frozen=True)
class Size:
    name: str
    config: WanVAEConfig
    height: int
    width: int

    def latents(self, num_frames: int, context: Context) -> Tensor:
        """Draw latents [C, T, H, W] of so many latent frames."""
        factor, suite = self.config.scale_factor_spatial, context.suite
        return suite.draw(
            self.config.z_dim, num_frames, self.height // factor, self.width // factor, dtype=torch.float32
        )


SIZES = (
    Size("wan2.1 720x1280", VAE_21, 720, 1280),
    Size("wan2.1 480x832", VAE_21, 480, 832),
    Size("wan2.2-5b 704x1280", VAE_22, 704, 1280),
)
NARROW_21 = WanVAEConfig(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
NARROW_22 = WanVAEConfig(
    base_dim=8,
    decoder_base_dim=16,
    z_dim=4,
    num_res_blocks=1,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
TINY = (Size("wan2.1 tiny", NARROW_21, 16, 32), Size("wan2.2-5b tiny", NARROW_22, 16, 32))


def cases(context: Context) -> Iterator[Case]:
    for size in TINY if context.dry else SIZES:
        yield Case(f"decode in turns, {size.name}", partial(_decoders, context, size))
        yield Case(f"bf16, {size.name}", partial(_error, context, size))
        for dtype in (torch.bfloat16, torch.float32):
            for chunk in CHUNKS:
                words = words_of(size, dtype, chunk)
                yield Case(f"decode, {words}", partial(_decode, context, size, dtype, chunk))
        for chunk in CHUNKS:
            words = words_of(size, torch.float32, chunk)
            yield Case(f"encode, {words}", partial(_encode, context, size, torch.float32, chunk))
    if not context.dry:
        yield Case("a whole clip", partial(_whole, context, SIZES[0]))


def _codec(context: Context, size: Size, dtype: torch.dtype, chunk: int) -> VideoCodec:
    """Return a codec as the engine's: in fp32, with its decoder in `dtype`."""
    module = vae(size.config, context.device, torch.float32)
    return VideoCodec(module, device=context.device, chunk=chunk, decoder_dtype=dtype)


def _decode(context: Context, size: Size, dtype: torch.dtype, chunk: int) -> Iterator[Line]:
    """Measure decoding in the main stream: the lane's stream has a pool of memory of its own."""
    codec, latents = _codec(context, size, dtype, chunk), size.latents(1 + STEADY * chunk, context)

    def run() -> None:
        deque(codec.decode(latents, beside=False), maxlen=0)

    yield from _coded(context, f"{words_of(size, dtype, chunk)}/decode", run)


def words_of(size: Size, dtype: torch.dtype, chunk: int) -> str:
    return f"{size.name}, {_word(dtype)}, chunk {chunk}"


def _encode(context: Context, size: Size, dtype: torch.dtype, chunk: int) -> Iterator[Line]:
    codec, suite = _codec(context, size, dtype, chunk), context.suite
    num_frames = 1 + STEADY * chunk * size.config.scale_factor_temporal
    frames = suite.draw(3, num_frames, size.height, size.width, dtype=torch.float32).clamp_(-1, 1)

    def run() -> None:
        deque(codec.encode_chunks(frames), maxlen=0)

    yield from _coded(context, f"{words_of(size, dtype, chunk)}/encode", run)


def _coded(context: Context, name: str, run: Run) -> Iterator[Line]:
    """Measure peak bytes above weights and input, and seconds of the whole run, which `_decoders` splits up."""
    run()  # picks algorithms, and makes the libraries' workspaces
    held, peak = held_bytes(context.device), peak_while(run, context.device)
    if held is not None and peak is not None:
        yield measured(f"peaks/{name}", "bytes", [max(0, peak - held)])
    seconds = [context.clock.seconds(run) for _ in range(1 if context.dry else 2)]
    yield measured(f"vae/{name}/{1 + STEADY} chunks", "s", seconds)
    if context.device.type == "cuda":
        yield Note(name=f"reserved, {name}", value=torch.cuda.memory_reserved(context.device))


def _decoders(context: Context, size: Size) -> Iterator[Line]:
    """Compare decoders in turns: fp32 with TF32 and without, bf16, and weights in channels-last."""
    runs: dict[str, Run] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for last in (False, True):
            codec = _codec(context, size, dtype, 1)
            if last:
                _to_channels_last(codec.decoder)
            latents = size.latents(3, context)
            name = _word(dtype) + (", channels-last weights" if last else "")
            runs[name] = partial(_frames, codec, latents)
            if dtype == torch.float32 and not last:
                runs[f"{name}, no TF32"] = partial(_without_tf32, codec, latents)
    turns = context.turns(f"vae/turns/{size.name}", runs)
    labels: Labels = {"latent_frames": 3, "frames": 9}
    yield from of_turns(f"vae/turns/{size.name}", turns, "bf16", labels)


def _to_channels_last(module: torch.nn.Module) -> None:
    """Put 4-D and 5-D weights in the memory order of the activations, so that no call copies them."""
    for parameter in module.parameters():
        if parameter.dim() in (4, 5):
            order = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=order)


def _without_tf32(codec: VideoCodec, latents: Tensor) -> None:
    with tf32(False):
        _frames(codec, latents)


def _error(context: Context, size: Size) -> Iterator[Line]:
    """Measure the error of bf16's and TF32's frames against true fp32's, with random weights, in levels of 255."""
    latents = size.latents(3, context)
    with tf32(False):
        exact = _clip(_codec(context, size, torch.float32, 1), latents)
    codecs: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: _clip(_codec(context, size, torch.bfloat16, 1), latents),
        "TF32": lambda: _clip(_codec(context, size, torch.float32, 1), latents),
    }
    for name, run in codecs.items():
        off = (run() - exact).abs()
        relative = float(off.square().sum().sqrt() / exact.square().sum().sqrt())
        yield measured(f"vae/error/{size.name}/{name}/relative", "of the frames", [relative])
        levels = off * 127.5
        yield measured(f"vae/error/{size.name}/{name}/mean", "levels of 255", [float(levels.mean())])
        yield measured(f"vae/error/{size.name}/{name}/worst", "levels of 255", [float(levels.max())])


def _whole(context: Context, size: Size) -> Iterator[Line]:
    """Measure decoding 81 frames to uint8 on the host, as for a request."""
    codec, latents = _codec(context, size, torch.bfloat16, 1), size.latents(21, context)

    def run() -> None:
        deque(codec.decode(latents), maxlen=0)

    run()
    yield measured(f"vae/whole/{size.name}, bf16, chunk 1", "s", [context.clock.seconds(run) for _ in range(2)])


def _frames(codec: VideoCodec, latents: Tensor) -> None:
    """Decode frames [3, n, H, W] a chunk, and drop them."""
    deque(codec.decode_float(latents), maxlen=0)


def _clip(codec: VideoCodec, latents: Tensor) -> Tensor:
    """Decode frames [3, F, H, W] in fp32, within [-1, 1]."""
    return torch.cat([chunk.float().clamp(-1, 1) for chunk in codec.decode_float(latents)], dim=1)


def _word(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


if __name__ == "__main__":
    sys.exit(main("vae"))
