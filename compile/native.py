"""Causal coders lowered to the operators of kernels/cpu, which work on frames [T, H, W, C].

ONNX Runtime's own convolutions do every multiplication and pass over memory between them; ours do an eighth, and what
follows a convolution (bias, shortcut, norm, SiLU) while its pixels are in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.onnx.ops import symbolic

from ..kernels.resample_conv import downsample_conv2d, upsample_conv2d
from .frames import Frames, Lowered, Views

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "skylapse"
OPERATORS = {"CausalConv3d", "HalvingConv2d", "LastFrames", "RMSNorm"}
EPS = 1e-24  # that of norm.h
Triple = tuple[int, int, int]


class Native(Frames):
    """Frames are [T, H, W, C]."""

    VIEWS: ClassVar[Views] = {
        "clip": lambda frames: frames.permute(3, 0, 1, 2).unsqueeze(0),
        "frames first": lambda frames: frames.permute(0, 3, 1, 2).unsqueeze(0),
        "channels last": lambda frames: frames.unsqueeze(0),
        "images": lambda frames: frames.permute(0, 3, 1, 2),
        "images, channels last": lambda frames: frames,
    }
    LOWERED: ClassVar[Lowered] = {
        **Frames.LOWERED,
        F.conv3d: "conv3d",
        F.rms_norm: "rms_norm",
        F.pad: "pad",
        Tensor.contiguous: "contiguous",
        upsample_conv2d: "upsample",
        downsample_conv2d: "downsample",
    }

    def __init__(self) -> None:
        super().__init__()
        self._joined: dict[int, tuple[Tensor, Tensor]] = {}  # id of frames -> (past, present) that they consist of
        self._normed: dict[int, tuple[Tensor, Tensor]] = {}  # -> (what the norm was of, weight)
        self._convolved: dict[int, CausalConv3d] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def frames_of(self, x: Tensor) -> Tensor:
        frames = self.frames(x)
        return x.squeeze(0).permute(1, 2, 3, 0) if frames is None else frames

    def of_images(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def _note(self, notes: dict[int, Any], frames: Tensor, made_of: Any) -> Tensor:
        notes[id(frames)] = made_of
        self._alive.append(frames)
        return frames

    # --- as they are written in a coder -----------------------------------------------------------------------------

    def cat(self, clips: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        joined = super().cat(clips, dim)
        if joined is not None and len(clips) == 2:
            past, present = (self.frames_of(clip) for clip in clips)
            self._note(self._joined, self.frames_of(joined), (past, present))
        return joined

    def take(self, x: Tensor, index: Any) -> Tensor | None:
        """Of a clip and its past the last frames, as many as the past has, are the next chunk's past."""
        frames = self.frames(x)
        past, present = self._joined.get(id(frames), (None, None))
        if past is not None and index[2:] == (slice(-past.shape[0], None),):
            return self.view(_operator("LastFrames", (past, present), past.shape))
        return super().take(x, index)

    def contiguous(self, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor | None:
        return None if self.frames(x) is None else x

    def pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
        frames = self.frames(x)
        if frames is None or len(pad) != 6 or any(pad[:4]) or pad[5]:
            return None
        return self.view(F.pad(frames, (0, 0, 0, 0, 0, 0, pad[4], 0)))

    def add(self, a: Tensor, b: Tensor) -> Tensor | None:
        frames = self.frames(b) if isinstance(b, Tensor) else None
        if (convolution := self._convolved.get(id(frames))) is not None:
            return self.view(convolution.plus(self.frames_of(a)))
        return super().add(a, b)

    def rms_norm(self, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor | None:
        for view in ("channels last", "images, channels last"):
            frames = self.frames(x, view)
            if frames is not None and eps == EPS:
                y = self._note(self._normed, _rms_norm(frames, weight, with_silu=False), (frames, weight))
                return self.view(y, view)
        return None

    def silu(self, x: Tensor, inplace: bool = False) -> Tensor | None:
        normed = self._normed.get(id(self.frames(x)))
        return super().silu(x) if normed is None else self.view(_rms_norm(*normed, with_silu=True))

    def turn(self, x: Tensor, source: int, target: int) -> Tensor | None:
        if id(x) not in self._known and (x.dim(), source, target) == (5, -1, 1) and x.shape[0] == 1:
            return self.view(x.squeeze(0))
        return super().turn(x, source, target)

    def conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: Triple = (1, 1, 1), padding: Triple = (0, 0, 0)
    ) -> Tensor | None:
        taps, height, width = weight.shape[2:]
        frames = self.frames_of(x)
        if tuple(stride) == (2, 1, 1) and (taps, height, width) == (3, 1, 1):
            gathered = torch.cat((frames[:-2:2], frames[1:-1:2], frames[2::2]), dim=-1)
            return self.view(gathered @ weight[..., 0, 0].permute(2, 1, 0).flatten(0, 1) + bias)
        known = height == width and {taps, height} <= {1, 3} and tuple(padding) == (0, height // 2, width // 2)
        if tuple(stride) != (1, 1, 1) or not known:
            return None
        past, present = self._joined.get(id(frames), (None, frames))
        return self.view(self._convolve(CausalConv3d(present, weight, bias, past)))

    def upsample(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        frames = self.frames(x, "images")
        frames = self.of_images(x) if frames is None else frames
        return self.view(self._convolve(CausalConv3d(frames, weight[:, :, None], bias, doubled=True)), "images")

    def downsample(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        frames = self.frames(x, "images")
        frames = self.of_images(x) if frames is None else frames
        num_frames, height, width, _ = frames.shape
        shape = (num_frames, height // 2, width // 2, weight.shape[0])
        return self.view(_operator("HalvingConv2d", (frames, weight, bias), shape), "images")

    def _convolve(self, convolution: CausalConv3d) -> Tensor:
        return self._note(self._convolved, convolution.plus(None), convolution)


@dataclass(frozen=True)
class CausalConv3d:
    """conv3d over the frames `past` and `x` [T, H, W, C], of nearest-neighbour `doubled` sides.

    weight: [C_out, C, taps, side, side], each 1 or 3; zeros lie around a frame, none before the first one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    past: Tensor | None = None
    doubled: bool = False

    def plus(self, residual: Tensor | None) -> Tensor:
        """[T', H', W', C_out], with a residual of that shape added."""
        num_past = 0 if self.past is None else self.past.shape[0]
        num_frames, height, width, _ = self.x.shape
        scale, (c_out, _, taps, *_) = 2 if self.doubled else 1, self.weight.shape
        shape = (num_frames + num_past - taps + 1, scale * height, scale * width, c_out)
        inputs = (self.x, self.weight, self.bias, self.past, residual)
        return _operator("CausalConv3d", inputs, shape, doubled=int(self.doubled))


def _rms_norm(frames: Tensor, weight: Tensor, with_silu: bool) -> Tensor:
    return _operator("RMSNorm", (frames, weight), frames.shape, silu=int(with_silu))


def _operator(name: str, inputs: Sequence[Tensor | None], shape: Sequence[int], **attributes: Any) -> Tensor:
    return symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=1)


def fuse(model: ir.Model) -> None:
    """Let a convolution norm its pixels itself where a norm with SiLU follows, and give nothing that nobody uses."""
    import onnx_ir as ir

    graph = model.graph
    for norm in [node for node in graph if node.op_type == "RMSNorm" and node.attributes["silu"].as_int()]:
        conv = norm.inputs[0].producer() if norm.inputs[0] else None
        if conv is None or conv.op_type != "CausalConv3d" or norm.outputs[0].is_graph_output():
            continue
        inputs = [*conv.inputs, *[None] * (5 - len(conv.inputs)), norm.inputs[1]]
        fused = ir.Node(DOMAIN, "CausalConv3d", inputs, conv.attributes.values(), num_outputs=2, version=1)
        graph.insert_before(conv, fused)
        for old, new in zip((conv.outputs[0], norm.outputs[0]), fused.outputs, strict=True):
            new.shape, new.type, new.name = old.shape, old.type, old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove([norm, conv], safe=True)
        if not fused.outputs[0].uses() and not fused.outputs[0].is_graph_output():
            fused.outputs[0].name = ""
    graph.sort()
