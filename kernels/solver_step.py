"""One step of a request's solver in one launch: guidance, clean prediction, corrector, predictor and a preview.

velocity = uncond + g (cond - uncond)           guidance (arXiv 2207.12598)
clean    = latents - sigma velocity             the flow's clean prediction (arXiv 2210.02747)
sample   = c_0 last_sample + c_1 clean + ...    corrector, where there is one, else latents
next     = p_0 sample + p_1 clean + p_2 earlier[0] + ...
preview  = uint8((weight clean + bias + 1) 127.5), SCALE x SCALE pixels for each latent position

Every update of UniPC and DPM-Solver++ is such weighted sums (runtime/sampler/state.py computes the weights); Euler's is
p = (s, 1 - s) with s = next sigma / sigma. At the sizes of latents these are launches, not arithmetic: 10 without this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launches import DTYPES, arch_of, find, points
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl

MAX_EARLIER = 3  # clean predictions that UniPC's corrector of order 3 reads
SCALE = 4  # pixels a side for each latent; runtime/vae/preview.py fits maps of this size


class SolverStep(NamedTuple):
    """latents, clean and sample [C, T, H, W] fp32; preview uint8 [T, SCALE H, SCALE W, 3]."""

    latents: Tensor
    clean: Tensor
    sample: Tensor  # the latents themselves where nothing corrects them
    preview: Tensor | None


def solver_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: float,
    predictor: Sequence[float],
    corrector: Sequence[float] = (),
    last_sample: Tensor | None = None,
    earlier: Sequence[Tensor] = (),
    preview: tuple[Tensor, Tensor] | None = None,
) -> SolverStep:
    """All tensors [C, T, H, W]: latents, last_sample and earlier (newest first) fp32, velocities in the model's dtype.

    uncond: None without guidance. preview: weight [3 SCALE^2, C] and bias of the map to pixels, or None.
    """
    weight, bias = preview or (None, None)
    run = _op if launches(latents) else _cpu
    moved, clean, sample, pixels = run(
        latents, cond, uncond, guidance_scale, sigma, [*predictor], [*corrector], last_sample, [*earlier], weight, bias
    )
    return SolverStep(moved, clean, sample if corrector else latents, None if preview is None else pixels)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _cpu(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: float,
    predictor: Sequence[float],
    corrector: Sequence[float],
    last_sample: Tensor | None,
    earlier: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operations of runtime/sampler and runtime/vae/preview.py, in their order: equal to the bit."""
    velocity = cond.float()
    if uncond is not None:
        velocity = torch.add(uncond.float(), velocity - uncond.float(), alpha=guidance_scale)
    clean = torch.add(latents, velocity, alpha=-sigma)
    sample = latents.new_empty(0)
    if corrector:
        assert last_sample is not None
        sample = _weighted_sum(corrector, (last_sample, clean, *earlier))
    moved = _weighted_sum(predictor, (sample if corrector else latents, clean, *earlier))
    pixels = latents.new_empty(0, dtype=torch.uint8)
    if weight is not None and bias is not None:
        colours = torch.einsum("pc,cthw->pthw", weight, clean) + bias[:, None, None, None]
        frames = F.pixel_shuffle(colours.transpose(0, 1), SCALE)
        levels = frames.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = levels.permute(0, 2, 3, 1).contiguous()
    return moved, clean, sample, pixels


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=False):
        total.add_(tensor, alpha=weight)
    return total


# --- Triton -----------------------------------------------------------------------------------------------------------


# height and width are of previews' addresses alone; as numbers of their own they would make six kernels of one.
@jit(do_not_specialize=["height", "width"])
def _kernel(
    latents,
    cond,
    uncond,
    last_sample,
    earlier_0,
    earlier_1,
    earlier_2,
    weight,
    bias,
    moved,
    clean_out,
    sample_out,
    pixels,
    num_channels,
    num_positions,
    height,
    width,
    guidance_scale,
    sigma,
    p_0,
    p_1,
    p_2,
    p_3,
    p_4,
    c_0,
    c_1,
    c_2,
    c_3,
    c_4,
    GUIDED: tl.constexpr,
    CORRECTS: tl.constexpr,
    EARLIER: tl.constexpr,
    PREVIEWS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    at = (
        channel[:, None] * num_positions + position[None, :]
    )  # 32 bits: 64 spilt 80 bytes a thread (sm_80, 48 channels)
    inside = (channel < num_channels)[:, None] & (position < num_positions)[None, :]

    velocity = tl.load(cond + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        away = tl.load(uncond + at, mask=inside, other=0.0).to(tl.float32)
        velocity = away + guidance_scale * (velocity - away)
    sample = tl.load(latents + at, mask=inside, other=0.0)
    clean = sample - sigma * velocity
    tl.store(clean_out + at, clean, mask=inside)

    if CORRECTS:
        sample = c_0 * tl.load(last_sample + at, mask=inside, other=0.0) + c_1 * clean
    total = p_1 * clean
    if EARLIER > 0:
        before = tl.load(earlier_0 + at, mask=inside, other=0.0)
        total += p_2 * before
        if CORRECTS:
            sample += c_2 * before
    if EARLIER > 1:
        before = tl.load(earlier_1 + at, mask=inside, other=0.0)
        total += p_3 * before
        if CORRECTS:
            sample += c_3 * before
    if EARLIER > 2:
        before = tl.load(earlier_2 + at, mask=inside, other=0.0)
        total += p_4 * before
        if CORRECTS:
            sample += c_4 * before
    if CORRECTS:
        tl.store(sample_out + at, sample, mask=inside)
    tl.store(moved + at, p_0 * sample + total, mask=inside)

    if PREVIEWS:
        SQUARE: tl.constexpr = SIDE * SIDE
        place = tl.arange(0, 4 * SQUARE)  # 3 SQUARE would be no power of two
        real = place < 3 * SQUARE
        colours = tl.load(bias + place, mask=real, other=0.0)[:, None] + tl.zeros((4 * SQUARE, BLOCK_P), tl.float32)
        # Channel by channel, its clean prediction made again from what the caches still hold: as a tl.dot in fp32 the
        # map spilt 6.7 kB a thread at 48 channels (sm_90).
        for c in range(num_channels):
            here = c * num_positions + position
            value = tl.load(cond + here, mask=position < num_positions, other=0.0).to(tl.float32)
            if GUIDED:
                other = tl.load(uncond + here, mask=position < num_positions, other=0.0).to(tl.float32)
                value = other + guidance_scale * (value - other)
            value = tl.load(latents + here, mask=position < num_positions, other=0.0) - sigma * value
            colours += tl.load(weight + place * num_channels + c, mask=real, other=0.0)[:, None] * value[None, :]
        level = tl.minimum(tl.maximum((colours + 1.0) * 127.5, 0.0), 255.0)
        level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to even as torch does; libdevice is not needed
        frame, rest = position // (height * width), position % (height * width)
        line = (frame * height + rest // width) * SIDE
        colour, i, j = place // SQUARE, place // SIDE % SIDE, place % SIDE
        pixel = (line[None, :] + i[:, None]) * width * SIDE + (rest % width * SIDE)[None, :] + j[:, None]
        to = pixels + pixel * 3 + colour[:, None]
        tl.store(to, level.to(tl.uint8), mask=real[:, None] & (position < num_positions)[None, :])


def _triton(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: float,
    predictor: Sequence[float],
    corrector: Sequence[float],
    last_sample: Tensor | None,
    earlier: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(latents, cond, uncond, predictor, corrector, last_sample, earlier, weight, bias)
    num_channels, t, h, w = latents.shape
    moved, clean = torch.empty_like(latents), torch.empty_like(latents)
    sample = torch.empty_like(latents) if corrector else latents.new_empty(0)
    pixels = latents.new_empty((t, SCALE * h, SCALE * w, 3) if weight is not None else 0, dtype=torch.uint8)
    reads = max(len(predictor), len(corrector)) - 2
    tensors = [*earlier[: max(0, reads)], None, None, None][:MAX_EARLIER]
    p, c = ([*weights, *[0.0] * 5][:5] for weights in (predictor, corrector))
    call = (arch_of(latents.device), DTYPES[cond.dtype], num_channels, t * h * w)
    launch = find("solver_step", "solver_step", *call)
    flags = (uncond is not None, bool(corrector), max(0, reads), weight is not None)
    constants = _constants(num_channels, *flags, launch["block_p"])
    with torch.cuda.device_of(latents):  # Triton launches on the current device, whatever its tensors' is
        _kernel[(-(-t * h * w // launch["block_p"]),)](
            *(latents, cond, uncond, last_sample, *tensors, weight, bias, moved, clean, sample, pixels),
            *(num_channels, t * h * w, h, w, guidance_scale, sigma, *p, *c),
            **constants,
            num_warps=launch["num_warps"],
        )
    return moved, clean, sample, pixels


def _constants(
    num_channels: int, guided: bool, corrects: bool, earlier: int, previews: bool, positions: int
) -> dict[str, Any]:
    flags = dict(GUIDED=guided, CORRECTS=corrects, EARLIER=earlier, PREVIEWS=previews)
    return dict(**flags, SIDE=SCALE, BLOCK_C=next_power_of_2(num_channels), BLOCK_P=positions)


def _check(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    predictor: Sequence[float],
    corrector: Sequence[float],
    last_sample: Tensor | None,
    earlier: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    states = dict(latents=latents, last_sample=last_sample, **{f"earlier[{i}]": x for i, x in enumerate(earlier)})
    tensors = {n: x for n, x in (states | dict(cond=cond, uncond=uncond)).items() if x is not None}
    check_floats(**tensors)
    for name, x in tensors.items():
        if x.shape != latents.shape or x.dim() != 4 or not x.numel() or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous {list(latents.shape)}, [C, T, H, W], got {list(x.shape)}")
        if name in states and x.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {x.dtype}")
    num_channels, *sides = latents.shape
    if num_channels > 64 or max(num_channels, 3 * SCALE**2) * math.prod(sides) >= 2**31:
        raise ValueError(f"latents must have at most 64 channels, and 2^31 elements or pixels, got {[*latents.shape]}")
    if (last_sample is None) and corrector:
        raise ValueError("a corrector reads last_sample, which is missing")
    reads = max(len(predictor), len(corrector)) - 2
    if len(predictor) < 2 or len(corrector) == 1 or not reads <= min(len(earlier), MAX_EARLIER):
        raise ValueError(f"{len(predictor)} and {len(corrector)} weights do not fit {len(earlier)} earlier predictions")
    if weight is not None:
        shape = (3 * SCALE**2, latents.shape[0])
        if bias is None or weight.shape != shape or bias.shape != shape[:1] or not weight.is_contiguous():
            raise ValueError(
                f"the preview's weight must be contiguous {list(shape)} with a bias, got {[*weight.shape]}"
            )
        check_floats(latents=latents, weight=weight, bias=bias)


_op = torch.library.custom_op("skylapse::solver_step", _cpu, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(_triton)


@_op.register_fake
def _(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: float,
    predictor: Sequence[float],
    corrector: Sequence[float],
    last_sample: Tensor | None,
    earlier: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, t, h, w = latents.shape
    pixels = latents.new_empty((t, SCALE * h, SCALE * w, 3) if weight is not None else (0,), dtype=torch.uint8)
    sample = torch.empty_like(latents) if corrector else latents.new_empty(0)
    return torch.empty_like(latents), torch.empty_like(latents), sample, pixels


def shipped() -> list[Shipped]:
    """Every row of solver_step.json: UniPC of order 2 with guidance, with and without a preview, and order 3; the first
    step; 48 channels.
    """
    cases = [(16, True, True, 2, True), (16, True, True, 2, False), (16, False, False, 0, False)]
    cases += [(16, True, True, 3, True), (48, True, True, 2, True)]
    found = points("solver_step", "solver_step", [channels for channels, *_ in cases])
    return [
        compiled(arch, dtype, *case, row.launch)
        for arch, row, dtype, width in found
        for case in cases
        if case[0] == width
    ]


def compiled(
    arch: int,
    dtype: str,
    num_channels: int,
    guided: bool,
    corrects: bool,
    earlier: int,
    previews: bool,
    launch: Mapping[str, Any],
) -> Shipped:
    """dtype: of the velocities."""
    constants = _constants(num_channels, guided, corrects, earlier, previews, launch["block_p"])
    types = dict.fromkeys(("latents", "last_sample", "moved", "clean_out", "sample_out", "weight", "bias"), "*fp32")
    types |= dict(cond=f"*{dtype}", uncond=f"*{dtype}", pixels="*u8")
    types |= {f"earlier_{i}": "*fp32" for i in range(MAX_EARLIER)}
    types |= dict.fromkeys(("num_channels", "num_positions", "height", "width"), "i32")
    types |= dict.fromkeys(("guidance_scale", "sigma", *(f"{x}_{i}" for x in "pc" for i in range(5))), "fp32")
    unused = [f"earlier_{i}" for i in range(earlier, MAX_EARLIER)]
    unused += [*([] if guided else ["uncond"]), *([] if corrects else ["last_sample"])]
    unused += [] if previews else ["weight", "bias"]
    words = [f"{dtype} {num_channels} channels, {earlier} earlier"]
    words += [w for w, on in (("guided", guided), ("corrected", corrects), ("preview", previews)) if on]
    types = {name: type_ for name, type_ in types.items() if name not in unused}
    constants |= dict.fromkeys(unused)
    name, num_warps = ", ".join(words), launch["num_warps"]
    return Shipped("solver_step", name, _kernel, types, constants, num_warps, architectures=(arch,))
