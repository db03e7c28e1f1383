"""A clip [1, C, T, H, W] worked on as its frames, in the layout of the runtime that the graph is exported for.

Every tensor that is made of frames by views alone has them noted beside it, so that what comes next starts from them:
or each convolution would turn the clip around twice. What is not known here is done as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Views = Mapping[str, Callable[[Tensor], Tensor]]
Lowered = Mapping[Any, str]  # function -> the method that does it on frames

# Views of a clip, and how one becomes another: (view, dimension that is moved, where to).
TURNS = {
    ("clip", 1, 2): "frames first",
    ("frames first", 1, 2): "clip",
    ("clip", 1, -1): "channels last",
    ("channels last", -1, 1): "clip",
    ("images", 1, -1): "images, channels last",
    ("images, channels last", -1, 1): "images",
}


class Frames(TorchFunctionMode):
    """While it is active, what is in LOWERED is done on frames; a method that returns None leaves a call as it is.

    A layout says how frames are seen as a "clip" [1, C, T, H, W], as "frames first" [1, T, C, H, W], as "channels last"
    [1, T, H, W, C], as "images" [T, C, H, W] and as those with "channels last" [T, H, W, C].
    """

    VIEWS: ClassVar[Views]
    LOWERED: ClassVar[Lowered] = {
        torch.cat: "cat",
        F.silu: "silu",
        Tensor.add: "add",
        Tensor.__getitem__: "take",
        Tensor.transpose: "turn",
        Tensor.movedim: "turn",
        Tensor.flatten: "flatten",
        Tensor.unflatten: "unflatten",
    }

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, str, Tensor]] = {}  # id -> (it, which view, its frames)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.LOWERED.get(func)
        result = getattr(self, name)(*args, **(kwargs or {})) if name else None
        return func(*args, **(kwargs or {})) if result is None else result

    def frames(self, x: Tensor, view: str = "clip") -> Tensor | None:
        """Of a tensor that is known as this view of them."""
        _, known, frames = self._known.get(id(x), (None, None, None))
        return frames if known == view else None

    def frames_of(self, x: Tensor) -> Tensor:
        """Of any clip."""
        raise NotImplementedError

    def view(self, frames: Tensor, view: str = "clip") -> Tensor:
        x = self.VIEWS[view](frames)
        self._known[id(x)] = (x, view, frames)
        return x

    def silu(self, x: Tensor, inplace: bool = False) -> Tensor | None:
        frames = self.frames(x)
        return None if frames is None else self.view(F.silu(frames))

    def add(self, a: Tensor, b: Tensor) -> Tensor | None:
        if not isinstance(b, Tensor) or (self.frames(a) is None and self.frames(b) is None) or b.dim() != a.dim():
            return None
        return self.view(self.frames_of(a) + self.frames_of(b))

    def cat(self, clips: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        if dim != 2 or all(self.frames(clip) is None for clip in clips):
            return None
        return self.view(torch.cat([self.frames_of(clip) for clip in clips]))

    def take(self, x: Tensor, index: Any) -> Tensor | None:
        frames = self.frames(x)
        if frames is None or not isinstance(index, tuple) or len(index) != 3 or index[:2] != (slice(None),) * 2:
            return None
        return self.view(frames[index[2]]) if isinstance(index[2], slice) else None

    def turn(self, x: Tensor, source: int, target: int) -> Tensor | None:
        """movedim and transpose between the views."""
        _, view, frames = self._known.get(id(x), (x, "none", x))
        to = TURNS.get((view, source, target))
        return None if to is None else self.view(frames, to)

    def flatten(self, x: Tensor, *dims: int) -> Tensor | None:
        frames = self.frames(x, "frames first") if dims == (0, 1) else None
        return None if frames is None else self.view(frames, "images")

    def unflatten(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor | None:
        if (x.dim(), dim, tuple(sizes)) != (4, 0, (1, -1)):
            return None
        frames = self.frames(x, "images")
        return self.view(self.of_images(x) if frames is None else frames, "frames first")

    def of_images(self, x: Tensor) -> Tensor:
        """Frames of any [T, C, H, W]."""
        raise NotImplementedError
