"""What requests ask for: classes with shapes and weights, and MLPerf's text-to-video parameters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Fields = Mapping[str, Any]
Ask = Callable[[int], tuple[str, Fields, float]]  # a request's number -> its class, its fields, its seconds of video

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
MOVES = ("moving left", "moving right", "moving up", "moving down", "standing still")


@dataclass(frozen=True)
class Kind:
    """One class of requests; video_s: how long its clips last."""

    name: str
    weight: float
    fields: Fields
    video_s: float


@dataclass(frozen=True)
class Workload:
    """verified: False where the results must not be taken for audited ones, whatever the parameters' source."""

    name: str
    kinds: tuple[Kind, ...]
    prompts: Sequence[str]
    seed: int | None = None  # of every request; None: its number
    negative_prompt: str = ""
    notes: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def ask(self, seed: int) -> Ask:
        """The same requests for the same seed. Where weights are whole, each stretch of their sum has them exactly."""
        rng = random.Random(seed)
        weights = [kind.weight for kind in self.kinds]
        whole = all(float(weight).is_integer() for weight in weights)
        drawn: list[tuple[str, Fields, float]] = []
        deck: list[Kind] = []

        def one(number: int) -> tuple[str, Fields, float]:
            while len(drawn) <= number:  # drawn in order, whatever order they are asked for in
                if whole and not deck:
                    deck.extend(kind for kind in self.kinds for _ in range(int(kind.weight)))
                    rng.shuffle(deck)
                kind = deck.pop() if whole else rng.choices(self.kinds, weights)[0]
                at = len(drawn)
                fields = {
                    "prompt": self.prompts[at % len(self.prompts)],
                    "seed": at if self.seed is None else self.seed,
                    **({"negative_prompt": self.negative_prompt} if self.negative_prompt else {}),
                    **kind.fields,
                }
                drawn.append((kind.name, fields, kind.video_s))
            return drawn[number]

        return one


def our_prompts(count: int = 256) -> list[str]:
    """Sentences of the demo model's world, which any other model reads too."""
    rng = random.Random(7)
    return [f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} {rng.choice(MOVES)}" for _ in range(count)]


def read_prompts(path: Path) -> list[str]:
    """One a line, or JSON lines of objects with `prompt`. ValueError names the line that is neither."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            try:
                found = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{path.name}, line {number}: must be an object with a prompt: {error!r}") from None
            if not isinstance(found, str) or not found.strip():
                raise ValueError(f"{path.name}, line {number}: prompt must be text, got {found!r}")
            prompts.append(found)
        else:
            prompts.append(line.strip())
    if not prompts:
        raise ValueError(f"{path.name} must have prompts, one a line, and has none")
    return prompts


def mixed(steps: int | None = None, prompts: Sequence[str] | None = None) -> Workload:
    """Three of four requests small, one large with 4.5 times the tokens; native sizes of the demo model."""
    more = {} if steps is None else {"num_inference_steps": steps}
    small = Kind("small", 3, {"size": "64x64", "num_frames": 9, "fps": 8, **more}, 9 / 8)
    large = Kind("large", 1, {"size": "96x64", "num_frames": 33, "fps": 8, **more}, 33 / 8)
    return Workload("mixed", (small, large), prompts or our_prompts())


# The one that Wan's repository ships (`sample_neg_prompt`) and diffusers' examples quote. MLPerf's rows all have one
# "canonical" negative prompt; whether it is this one to the letter was not checked, and the results say so.
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
MLPERF_PROMPTS = 248
MLPERF_FRAMES, MLPERF_FPS = 81, 16


def mlperf_t2v(prompts: Sequence[str] | None = None, steps: int | None = None) -> Workload:
    """720x1280, 81 frames at 16 a second, 20 steps, guidance 4.0 and 3.0, seed 42, 248 prompts.

    Not an MLPerf result, whoever runs it: their prompts and their initial latent are not distributed with this
    package, no accuracy run and no caching audit belongs to it. `notes` says so, and where the prompts are from.
    """
    fields = {
        "size": "720x1280",
        "num_frames": MLPERF_FRAMES,
        "fps": MLPERF_FPS,
        "num_inference_steps": steps or 20,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "boundary_ratio": 0.875,
    }
    kind = Kind("mlperf-t2v", 1, fields, MLPERF_FRAMES / MLPERF_FPS)
    notes = {
        "status": "unverified",
        "rules": "MLPerf Inference v6.0 text-to-video, parameters and scenarios alone",
        "prompts": "given by --prompts" if prompts else "this package's own, not MLPerf's",
        "num_prompts": len(prompts) if prompts else MLPERF_PROMPTS,
        "negative_prompt": "Wan's own",
        "initial_latent": "by seed 42, not MLPerf's file",
    }
    own = prompts or our_prompts(MLPERF_PROMPTS)
    return Workload("mlperf-t2v", (kind,), own, seed=42, negative_prompt=WAN_NEGATIVE, notes=notes)


WORKLOADS: Mapping[str, Callable[[int | None, Sequence[str] | None], Workload]] = {
    "mixed": mixed,
    "mlperf-t2v": lambda steps, prompts: mlperf_t2v(prompts, steps),
}
