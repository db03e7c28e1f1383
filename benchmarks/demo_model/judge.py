"""The demo model's judge: reads colour, shape, direction, background and size back out of a clip.

It never sees the prompt. An attribute that it cannot read is None, which counts as wrong in `score`.

Shape letters: T frames, H height, W width, P side of the patch that the shape is resampled onto, N templates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, background, shape_distance

ATTRIBUTES = ("colour", "shape", "direction", "background", "size")
Reading = dict[str, str | None]

_BACKDROP_LIMIT = 60.0  # RGB distance (of 441) of the calmest 70 % of pixels beyond which no backdrop is recognised
_CONTRAST = 24.0  # RGB distance from the backdrop that makes a pixel foreground; white on the sky has 51
_STILL = 1 / 3  # travel, in widths of the shape, under which it stands still
_DIAGONAL = 0.6  # travel across the main axis, as a share of the travel along it, beyond which no direction is named
_LEAST_OVERLAP = 0.7  # of shape and best template, averaged over the frames, below which no shape is named


def judge(frames: np.ndarray[Any, Any] | Tensor) -> Reading:
    """Return labels as `scenes.Scenes.labels` for uint8 frames [T, H, W, 3], T >= 2, None where nothing can be read."""
    clip = torch.as_tensor(frames)
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape[0] < 2 or clip.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8 [T >= 2, H, W, 3], got {clip.dtype} {list(clip.shape)}")
    reading: Reading = dict.fromkeys(ATTRIBUTES)
    clip = clip.permute(0, 3, 1, 2).float()
    reading["background"], behind = _read_background(clip)
    if behind is None:
        return reading
    found = _find_shape(clip, behind)
    if found is None:
        return reading
    colour, coverage = found
    reading["colour"] = nearest_colour(colour)

    area, centre = _moments(coverage)
    seen = area > 0.5 * _least_area(*clip.shape[-2:])
    if seen.float().mean() < 0.75:  # it must be there in nearly every frame to have a shape and a path
        return reading
    area, centre, coverage = area[seen], centre[seen], coverage[seen]
    reading["direction"] = _read_direction(torch.nonzero(seen)[:, 0].float(), centre, area, len(clip))
    reading["shape"] = _read_shape(coverage, centre, area)
    reading["size"] = _read_size(reading["shape"], area, min(clip.shape[-2:]))
    return reading


def score(clips: Sequence[np.ndarray[Any, Any] | Tensor], labels: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Return the share of clips read as labelled, per attribute; an attribute that a label leaves out is not asked."""
    if len(clips) != len(labels):
        raise ValueError(f"clips and labels must be as many, got {len(clips)} and {len(labels)}")
    right: dict[str, list[bool]] = {attribute: [] for attribute in ATTRIBUTES}
    for clip, wanted in zip(clips, labels, strict=True):
        reading = judge(clip)
        for attribute, label in wanted.items():
            right[attribute].append(reading[attribute] == label)
    return {attribute: sum(hits) / len(hits) for attribute, hits in right.items() if hits}


# Background ----------------------------------------------------------------------------------------------------------


def _read_background(clip: Tensor) -> tuple[str | None, Tensor | None]:
    """The backdrop's name, and its picture fitted to each frame [T, 3, H, W]; the shape's pixels are trimmed away."""
    height, width = clip.shape[-2:]
    middle = clip[:: max(1, len(clip) // 7)].median(0).values  # [3, H, W]; few frames do, and more cost 4 ms
    backdrops = _backdrops(height, width)
    distance = (middle - backdrops).square().sum(1).sqrt()  # [5, H, W]
    calm = distance.flatten(1).kthvalue(int(0.7 * height * width), dim=1).values  # [5]
    trimmed = torch.where(distance <= calm[:, None, None], distance, 0).sum((1, 2)) / (0.7 * height * width)
    best = int(trimmed.argmin())
    if trimmed[best] > _BACKDROP_LIMIT:
        return None, None

    # A generated backdrop is off by a horizon some pixels too low, by a shift of colour, by contrast. The first is
    # mended by moving the picture, the others by a correction for each row, taken from pixels that look like it.
    fitted = _aligned(backdrops[best], middle)
    residual = middle - fitted
    apart = residual.square().sum(0).sqrt()  # [H, W]
    likely = apart <= max(1.5 * float(calm[best]), 20.0)
    rows = torch.where(likely, residual, torch.nan).nanmedian(-1, keepdim=True).values  # [3, H, 1]
    everywhere = residual[:, likely].median(1).values[:, None, None]
    enough = (likely.float().mean(-1) >= 0.25)[None, :, None]
    behind = fitted + torch.where(enough, rows, everywhere)
    if ((clip - behind).square().sum(1) > _BACKDROP_LIMIT**2).float().mean() > 0.4:  # the shape covers a fifth at most
        return None, None
    flicker = ((clip - behind).clamp(-_CONTRAST, _CONTRAST) * likely).sum((2, 3)) / likely.sum()  # [T, 3]
    return BACKGROUNDS[best], behind + flicker[:, :, None, None]


def _aligned(backdrop: Tensor, middle: Tensor) -> Tensor:
    """Return the backdrop [3, H, W], moved up or down by at most 3 rows if that brings it much nearer the picture."""
    height = backdrop.shape[-2]
    rows = torch.stack([(torch.arange(height) - by).clamp(0, height - 1) for by in (0, -1, 1, -2, 2, -3, 3)])
    moved = backdrop[:, rows].transpose(0, 1)  # [7, 3, H, W]
    residual = middle - moved
    residual = residual - residual.flatten(2).median(-1).values[..., None, None]  # a shift of colour is no movement
    distance = residual.abs().sum(1).clamp(max=2 * _CONTRAST).sum((1, 2))  # truncated: the shape counts alike in all
    best = int(distance.argmin())
    return moved[best if distance[best] < 0.8 * distance[0] else 0]


@lru_cache(maxsize=16)
def _backdrops(height: int, width: int) -> Tensor:
    """Return the backdrops [5, 3, H, W], 0 to 255."""
    return torch.stack([(background(name, height, width) + 1) * 127.5 for name in BACKGROUNDS])


# Foreground ----------------------------------------------------------------------------------------------------------


def _find_shape(clip: Tensor, behind: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the shape's colour [3] and its coverage [T, H, W] in [0, 1], or None."""
    difference = clip - behind
    foreground = _boxed(difference).square().sum(1) > _CONTRAST**2  # [T, H, W]; noise of 6 has become 2
    core = ~_grown(~foreground, 1)  # specks, and lines of two pixels along a misplaced horizon, vanish
    pixels = clip.permute(1, 0, 2, 3)[:, core]  # [3, pixels]
    if pixels.shape[1] < 0.25 * len(clip) * _least_area(*clip.shape[-2:]):
        return None
    near = _grown(core, 2)
    colour = pixels[:, :: max(1, pixels.shape[1] // 2000)].median(1).values

    # The share of the way from the backdrop to the colour that each pixel has gone.
    contrast = colour[:, None, None] - behind  # [T, 3, H, W]
    coverage = (difference * contrast).sum(1) / contrast.square().sum(1).clamp(min=_CONTRAST**2)
    return colour, _alone(coverage.clamp(0, 1) * near)


def _boxed(picture: Tensor) -> Tensor:
    """Return the mean over 3x3 pixels of [..., H, W], zeros beyond the edges; by slices, 5x faster than avg_pool2d."""
    across = picture.clone()
    across[..., 1:] += picture[..., :-1]
    across[..., :-1] += picture[..., 1:]
    boxed = across.clone()
    boxed[..., 1:, :] += across[..., :-1, :]
    boxed[..., :-1, :] += across[..., 1:, :]
    return boxed.div_(9)


def _grown(mask: Tensor, by: int) -> Tensor:
    """Return the mask [..., H, W] grown by so many pixels, corners included."""
    for dim in (-1, -2):
        size, source = mask.shape[dim], mask
        mask = mask.clone()
        for step in range(1, by + 1):
            mask.narrow(dim, step, size - step).logical_or_(source.narrow(dim, 0, size - step))
            mask.narrow(dim, 0, size - step).logical_or_(source.narrow(dim, step, size - step))
    return mask


def _alone(coverage: Tensor) -> Tensor:
    """The coverage within reach of the shape's own centre: what lies elsewhere is no part of it."""
    height, width = coverage.shape[-2:]
    for _ in range(2):
        area, centre = _moments(coverage)
        reach = 2.2 * (area / math.pi).sqrt() + 1  # a star's tips lie 1.5 equivalent radii away
        dx = torch.arange(width) + 0.5 - centre[:, 0, None]  # [T, W]
        dy = torch.arange(height) + 0.5 - centre[:, 1, None]  # [T, H]
        apart = dx.square()[:, None, :] + dy.square()[:, :, None]
        coverage = coverage * (apart <= reach.square()[:, None, None])
    return coverage


def _moments(coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Return the area [T] in pixels and the centroid [T, 2] (x, y)."""
    height, width = coverage.shape[-2:]
    area = coverage.sum((1, 2))
    x = (coverage.sum(1) * (torch.arange(width) + 0.5)).sum(1)
    y = (coverage.sum(2) * (torch.arange(height) + 0.5)).sum(1)
    return area, torch.stack([x, y], 1) / area.clamp(min=1e-6)[:, None]


def _least_area(height: int, width: int) -> float:
    return min(_AREAS.values()) * (min(SIZES.values()) * min(height, width)) ** 2


# Colour --------------------------------------------------------------------------------------------------------------


def nearest_colour(colour: Tensor) -> str:
    """Return the name of the nearest colour to an RGB triple [3], 0 to 255.

    In RGB, where a generator's errors are even: of clips shifted by 20 at contrast 0.85 CIE Lab misreads 2 % (blue as
    purple), Oklab 3 % (yellow as orange), RGB under 0.5 %.
    """
    names = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return list(COLOURS)[int((names - colour).square().sum(-1).argmin())]


# Direction -----------------------------------------------------------------------------------------------------------


def _read_direction(times: Tensor, centre: Tensor, area: Tensor, num_frames: int) -> str | None:
    """Read the direction from the straight line fitted to the centroids [T, 2] at the frame numbers `times` [T]."""
    since = times - times.mean()
    slope = (since[:, None] * (centre - centre.mean(0))).sum(0) / since.square().sum().clamp(min=1e-6)
    travel = slope * (num_frames - 1)  # [2] pixels
    width = 2 * float((area.median() / math.pi).sqrt())
    if float(travel.norm()) < _STILL * width:
        return "standing still"
    along, across = sorted(travel.abs().tolist(), reverse=True)
    if across > _DIAGONAL * along:
        return None
    main = int(travel.abs().argmax())
    heading = (int(travel[0].sign()), 0) if main == 0 else (0, int(travel[1].sign()))
    return next(name for name, step in DIRECTIONS.items() if step == heading)


# Shape and size ------------------------------------------------------------------------------------------------------

_PATCH = 32  # pixels a side
_REACH = 2.0  # half the patch's side, in equivalent radii (of the circle of the same area)


def _read_shape(coverage: Tensor, centre: Tensor, area: Tensor) -> str | None:
    """The shape whose templates overlap most with the coverage [T, H, W], summed over the frames."""
    height, width = coverage.shape[-2:]
    at = (torch.arange(_PATCH) + 0.5) / _PATCH * 2 - 1  # [P]
    reach = _REACH * (area / math.pi).sqrt()[:, None]  # [T, 1]
    x = 2 * (centre[:, :1] + at * reach) / width - 1  # [T, P]
    y = 2 * (centre[:, 1:] + at * reach) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, _PATCH, -1), y[:, :, None].expand(-1, -1, _PATCH)], -1)
    patches = F.grid_sample(coverage[:, None], grid, align_corners=False).flatten(1)  # [T, P * P]

    templates, kinds = _templates()  # [N, P * P], [N]
    shared = patches @ templates.T  # [T, N]
    union = patches.square().sum(1, keepdim=True) + templates.square().sum(1) - shared
    overlap = shared / union.clamp(min=1e-6)
    best = torch.stack([overlap[:, kinds == kind].amax(1) for kind in range(len(SHAPES))], 1).mean(0)  # [4]
    return SHAPES[int(best.argmax())] if best.amax() >= _LEAST_OVERLAP else None


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor]:
    """Soft pictures [N, P * P] of the shapes at equivalent radius 1, moved and scaled a little; their kinds [N]."""
    at = ((torch.arange(_PATCH) + 0.5) / _PATCH * 2 - 1) * _REACH
    pictures, kinds = [], []
    for kind, name in enumerate(SHAPES):
        for scale in (0.88, 0.94, 1.0, 1.06, 1.12):
            for dx in (-0.1, 0.0, 0.1):
                for dy in (-0.1, 0.0, 0.1):
                    radius = torch.tensor([scale * math.sqrt(math.pi / _AREAS[name])])
                    x, y = (at - dx)[None, None, None, :], (at - dy)[None, None, :, None]
                    distance = shape_distance(torch.tensor([kind]), x, y, radius)
                    pictures.append((0.5 - distance / 0.25).clamp(0, 1).flatten())  # edges two small pixels wide
                    kinds.append(kind)
    return torch.stack(pictures), torch.tensor(kinds)


def _read_size(shape: str | None, area: Tensor, side: int) -> str:
    """The nearest size, on a logarithmic scale, to the radius that the area [T] in pixels speaks for."""
    per_radius = _AREAS[shape] if shape else sum(_AREAS.values()) / len(_AREAS)
    radius = math.sqrt(float(area.median()) / per_radius) / side
    return min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius)))


def _area_of(kind: int) -> float:
    """Return the area of a shape of radius 1, counted on a fine grid."""
    at = (torch.arange(400) + 0.5) / 100 - 2
    distance = shape_distance(torch.tensor([kind]), at[None, None, None, :], at[None, None, :, None], torch.ones(1))
    return float((distance < 0).float().sum()) / 100**2


_AREAS = {name: _area_of(kind) for kind, name in enumerate(SHAPES)}
