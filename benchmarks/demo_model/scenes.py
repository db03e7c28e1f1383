"""The demo model's world: what a prompt can say, and how it looks.

Shape letters: B scenes, T frames, H height, W width. A scene is one shape on one background, moving in a straight line
at constant speed by at least its own width; it stays inside the frame.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 35),
    "orange": (255, 135, 0),
    "yellow": (255, 230, 40),
    "green": (15, 125, 45),
    "blue": (30, 50, 230),
    "purple": (135, 30, 165),
    "white": (252, 252, 252),
    "black": (8, 8, 10),
    "pink": (255, 105, 185),
    "cyan": (0, 225, 235),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "standing still": (0, 0),
}
BACKGROUNDS = ("at night", "at sunset", "over a meadow", "over the sea", "on gray")
SIZES: dict[str, float] = {"small": 0.15, "large": 0.2}  # radius as a share of the frame's shorter side

# First of each list is the canonical word; the others are said a third of the time in training.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "circle": ("ball", "disc"),
    "square": ("box", "block"),
    "moving left": ("going left", "moving to the left", "sliding left", "flying left"),
    "moving right": ("going right", "moving to the right", "sliding right", "flying right"),
    "moving up": ("going up", "rising", "moving upwards", "flying up"),
    "moving down": ("going down", "falling", "moving downwards", "sinking"),
    "standing still": ("not moving", "at rest"),
    "at night": ("in the dark", "under the night sky"),
    "at sunset": ("at dusk", "in the evening"),
    "over a meadow": ("over grass", "above a meadow", "over a field"),
    "over the sea": ("over the ocean", "above the sea", "over water"),
    "on gray": ("on grey", "on a gray background"),
}


@dataclass(frozen=True)
class Scenes:
    """B scenes: indices into the tables above, and the placement that the prompt does not say."""

    colour: Tensor  # [B] int64
    shape: Tensor  # [B] int64
    direction: Tensor  # [B] int64
    background: Tensor  # [B] int64
    size: Tensor  # [B] int64
    jitter: Tensor  # [B] radius factor
    travel: Tensor  # [B] in [0, 1], between the least and the greatest distance that fits
    place: Tensor  # [B, 2] in [0, 1], where the path lies (x, y)

    def __len__(self) -> int:
        return len(self.colour)

    def labels(self, i: int) -> dict[str, str]:
        return {
            "colour": list(COLOURS)[int(self.colour[i])],
            "shape": SHAPES[int(self.shape[i])],
            "direction": list(DIRECTIONS)[int(self.direction[i])],
            "background": BACKGROUNDS[int(self.background[i])],
            "size": list(SIZES)[int(self.size[i])],
        }


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` scenes, every attribute uniform."""

    def index(choices: int) -> Tensor:
        return torch.randint(choices, (count,), generator=generator)

    return Scenes(
        colour=index(len(COLOURS)),
        shape=index(len(SHAPES)),
        direction=index(len(DIRECTIONS)),
        background=index(len(BACKGROUNDS)),
        size=index(len(SIZES)),
        jitter=0.95 + 0.10 * torch.rand(count, generator=generator),
        travel=torch.rand(count, generator=generator),
        place=torch.rand(count, 2, generator=generator),
    )


def render(scenes: Scenes, num_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frames [B, 3, T, H, W] in [-1, 1] and the shape's coverage [B, 1, T, H, W] in [0, 1]."""
    radius = torch.tensor(list(SIZES.values()))[scenes.size] * scenes.jitter * min(height, width)
    half_width = radius * torch.tensor(_HALF_WIDTHS)[scenes.shape]
    frame = torch.tensor([float(width), float(height)])
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[scenes.direction]  # [B, 2]

    # The centre stays `margin` away from every edge; the path's length lies between the width and what is left.
    margin = (radius * torch.tensor(_REACHES)[scenes.shape])[:, None] + 1.0
    room = (frame - 2 * margin).clamp(min=0)
    longest = (room * heading.abs()).sum(-1)
    shortest = torch.minimum(2 * half_width, longest)
    path = heading * (shortest + scenes.travel * (longest - shortest))[:, None]
    low = margin + (-path).clamp(min=0)
    high = frame - margin - path.clamp(min=0)
    start = low + (high - low).clamp(min=0) * scenes.place
    progress = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.zeros(1)
    centre = start[:, None] + path[:, None] * progress[None, :, None]  # [B, T, 2]

    xs = torch.arange(width) + 0.5 - centre[..., 0, None]  # [B, T, W]
    ys = torch.arange(height) + 0.5 - centre[..., 1, None]  # [B, T, H]
    distance = shape_distance(scenes.shape, xs[:, :, None, :], ys[:, :, :, None], radius)
    coverage = (0.5 - distance).clamp(0, 1)[:, None]  # [B, 1, T, H, W]
    colour = (torch.tensor(list(COLOURS.values())) / 127.5 - 1)[scenes.colour][:, :, None, None, None]
    backdrops = torch.stack([background(name, height, width) for name in BACKGROUNDS])
    behind = backdrops[scenes.background][:, :, None]
    return behind + coverage * (colour - behind), coverage


_SQUARE, _TRIANGLE, _STAR = 0.88, 1.2, 1.18  # sizes relative to the circle's radius, so that the areas are alike
_HALF_WIDTHS = (1.0, _SQUARE, _TRIANGLE * math.cos(math.pi / 6), _STAR * math.cos(math.pi / 10))
_REACHES = (1.0, _SQUARE, _TRIANGLE, _STAR)  # farthest point from the centre along an axis


def shape_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to each outline, negative inside; x [B, T, 1, W], y [B, T, H, 1] from the centre."""
    r = radius[:, None, None, None]
    x, y = torch.broadcast_tensors(x, y)
    out = torch.empty_like(x)
    for index, distance in enumerate((_circle, _square, _triangle, _star)):
        chosen = shape == index
        if chosen.any():
            out[chosen] = distance(x[chosen], y[chosen], r[chosen])
    return out


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - _SQUARE * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, point up: the farthest of three half planes, the centroid at the origin."""
    inner = 0.5 * _TRIANGLE * r
    slant = x.abs() * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
    return torch.maximum(y, slant) - inner


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points, one up: the outline's ten edges folded onto one."""
    outer, inner = _STAR * r, 0.42 * _STAR * r
    angle = torch.atan2(x, -y)
    fold = 2 * math.pi / 5
    angle = (angle - fold * torch.round(angle / fold)).abs()  # [0, pi / 5] from the nearest point
    length = (x * x + y * y).sqrt()
    px, py = length * torch.cos(angle), length * torch.sin(angle)
    ex, ey = inner * math.cos(fold / 2) - outer, inner * math.sin(fold / 2)
    return ((px - outer) * ey - py * ex) / (ex * ex + ey * ey).sqrt()


def background(name: str, height: int, width: int) -> Tensor:
    """Return a background [3, H, W] in [-1, 1]."""
    y = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    x = ((torch.arange(width) + 0.5) / width)[None, :].expand(height, width)
    if name == "on gray":
        image = _blend(y, (0.0, (128, 128, 128)), (1.0, (128, 128, 128)))
    elif name == "at night":
        image = _blend(y, (0.0, (38, 42, 98)), (0.7, (70, 74, 140)), (1.0, (60, 56, 108)))
    elif name == "at sunset":
        image = _blend(y, (0.0, (92, 70, 140)), (0.45, (196, 104, 110)), (0.75, (244, 170, 108)), (1.0, (214, 128, 92)))
    elif name == "over the sea":
        image = _blend(
            y, (0.0, (168, 206, 236)), (0.38, (206, 226, 238)), (0.42, (82, 158, 186)), (1.0, (44, 112, 150))
        )
    else:
        hill = y + 0.035 * torch.sin(2 * math.pi * x)
        image = _blend(
            hill, (0.0, (158, 200, 240)), (0.52, (208, 228, 244)), (0.57, (136, 196, 92)), (1.0, (104, 172, 72))
        )
    return image / 127.5 - 1


def _blend(at: Tensor, *stops: tuple[float, tuple[int, int, int]]) -> Tensor:
    """Return colours [3, H, W] interpolated between stops at the heights `at` [H, W]."""
    image = torch.tensor(stops[0][1], dtype=torch.float32)[:, None, None].expand(3, *at.shape)
    for (y0, _), (y1, colour) in itertools.pairwise(stops):
        share = ((at - y0) / (y1 - y0)).clamp(0, 1)
        image = image + share * (torch.tensor(colour, dtype=torch.float32)[:, None, None] - image)
    return image


def caption(labels: dict[str, str], generator: torch.Generator, omit: float = 0.1, synonyms: float = 0.33) -> str:
    """A prompt for a scene; each part but the shape is left out with probability `omit`."""

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    def say(word: str) -> str:
        others = SYNONYMS.get(word, ())
        return others[int(chance() * len(others))] if others and chance() < synonyms else word

    direction = labels["direction"]
    motion = direction if direction == "standing still" else f"moving {direction}"
    words = [
        "a",
        say(labels["size"]) if chance() >= omit else "",
        say(labels["colour"]) if chance() >= omit else "",
        say(labels["shape"]),
        say(motion) if chance() >= omit else "",
        say(labels["background"]) if chance() >= omit else "",
    ]
    return " ".join(word for word in words if word)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = ["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS, *SIZES, *SYNONYMS]
    phrases += [other for others in SYNONYMS.values() for other in others]
    return sorted({word for phrase in phrases for word in phrase.split()})
