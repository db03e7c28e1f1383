"""A streaming coder as its backends see it: one function in two graphs, and the shapes of its explicit states.

Shape letters: C channels, T frames, H height, W width of a chunk; h, w of its latents; n latent frames of a chunk.
A clip is one `first` call (one latent frame, no states in) and any number of `next` calls (n latent frames, states in).
Every tensor is [1, C, T, H, W]. States are plain tensors of the caller's: a backend keeps nothing of a clip, so clips
may be interleaved, and one may be left at any time.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Handed over: what runs eagerly empties the list as it reads it, what is compiled leaves it as it is.
States = list[Tensor]
Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, int, int, int, int]
Run = Callable[[Tensor, States | None], tuple[Tensor, States]]

FIRST, NEXT = "first", "next"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def copied(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A copy of a module with its weights on a device, in a dtype. It shares those that are so already."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to(device, dtype)
    return copy.deepcopy(module, memo)


def owned(state: Tensor) -> Tensor:
    """A state with no bytes but its own: as a view it would keep all of the tensor that it was cut from."""
    if torch.compiler.is_exporting() or state.untyped_storage().nbytes() == state.nbytes:
        return state  # what a graph gives back is a buffer of its own
    return state.clone()


@dataclass(frozen=True)
class StateShape:
    """One state: [1, channels, frames, scale h, scale w] of latents of h x w."""

    channels: int
    frames: int
    scale: int

    def at(self, height: int, width: int) -> Shape:
        return 1, self.channels, self.frames, self.scale * height, self.scale * width


@dataclass(frozen=True)
class StateSpec:
    """All states of a family's coder, in the order in which its functions take and return them."""

    shapes: tuple[StateShape, ...]

    def at(self, height: int, width: int) -> list[Shape]:
        """Shapes for latents of height x width."""
        return [shape.at(height, width) for shape in self.shapes]

    def num_bytes(self, height: int, width: int, itemsize: int) -> int:
        return sum(s.channels * s.frames * s.scale**2 for s in self.shapes) * height * width * itemsize


@dataclass(frozen=True)
class Coder:
    """Half of a VAE: `module(x, states | None)` returns (y, new states), and never writes into what it is given."""

    kind: str  # decoder or encoder
    module: nn.Module
    in_channels: int
    out_channels: int
    in_scale: int  # pixels a side of one latent, as the input has them: 1 for a decoder
    out_scale: int  # as the output has them
    in_frames: int  # input frames of a latent frame in `next`: 1 for a decoder
    out_frames: int
    max_any_area: int | None = None  # latents of a frame that a graph for any size may take; larger ones need their own

    def __call__(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        result: tuple[Tensor, States] = self.module(x, states)
        return result

    def input_shape(self, num_latents: int, height: int, width: int, graph: str) -> Shape:
        """Of the input for `num_latents` latent frames of height x width; in `first` there is one frame."""
        frames = 1 if graph == FIRST else num_latents * self.in_frames
        return 1, self.in_channels, frames, height * self.in_scale, width * self.in_scale

    def output_shape(self, x: Sequence[int], graph: str) -> Shape:
        """Of the output for an input of shape `x`."""
        frames = 1 if graph == FIRST else x[2] // self.in_frames * self.out_frames
        height, width = (side // self.in_scale * self.out_scale for side in x[3:])
        return 1, self.out_channels, frames, height, width

    def latent_size(self, x: Sequence[int]) -> tuple[int, int]:
        """(h, w) of an input of shape `x`."""
        return x[3] // self.in_scale, x[4] // self.in_scale

    @cached_property
    def states(self) -> StateSpec:
        """Read off the module itself, run without memory: a table beside the code could only fall behind it."""
        meta = {name: torch.empty_like(p, device="meta") for name, p in self.module.named_parameters()}
        meta |= {name: torch.empty_like(b, device="meta") for name, b in self.module.named_buffers()}
        dtype = next(self.module.parameters()).dtype
        height, width = 6, 10
        x = torch.empty(self.input_shape(1, height, width, FIRST), dtype=dtype, device="meta")
        with torch.inference_mode():
            _, states = functional_call(self.module, meta, (x, None))
        shapes = []
        for state in states:
            scale, odd = divmod(state.shape[3], height)
            if odd or state.shape[4] != scale * width:
                raise ValueError(f"a state of {list(state.shape)} does not grow with latents of {height} x {width}")
            shapes.append(StateShape(state.shape[1], state.shape[2], scale))
        return StateSpec(tuple(shapes))

    @cached_property
    def digest(self) -> str:
        """Of every weight's name, type, shape and bytes, and of the source that says what is done with them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for source in sorted({inspect.getsourcefile(type(part)) or "" for part in self.module.modules()}):
            if source and "site-packages" not in Path(source).parts:
                digest.update(Path(source).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a coder is built for."""

    dtype: str = "fp32"
    size: tuple[int, int] | None = None  # (h, w) of the latents; None: any
    chunk: int | None = None  # latent frames of a `next`; None: any
    lowering: str = "none"  # to planar frames (lowering.py) or to operators of our own (native.py)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def channels_last(self) -> bool:
        """Whether its graphs take and give [1, T, H, W, C] in place of [1, C, T, H, W]."""
        return self.lowering == "native"

    def laid_out(self, clip: Sequence[int]) -> Shape:
        """Shape of a clip [1, C, T, H, W] as its graphs have it."""
        b, c, t, h, w = clip
        return (b, t, h, w, c) if self.channels_last else (b, c, t, h, w)


class Graph(nn.Module):
    """`first` or `next` with its states as arguments and results of their own, as exporters want them."""

    def __init__(self, coder: Coder, graph: str) -> None:
        super().__init__()
        self.module, self.is_first = coder.module, graph == FIRST

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, new = self.module(x, None if self.is_first else list(states))
        return (y, *new)
