"""Find everything for which the host would wait for a CUDA device, without one: a watch, and a model to watch.

A plain dispatch mode sees no copy in `torch.tensor(list, device="cuda")`, so calls are watched too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.runtime.families.wan.denoiser import WanDenoiser
from skylapse.runtime.models.model import Model
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.overlap import CudaLane, Fetch
from skylapse.runtime.vae.wan import WanVAE

aten = torch.ops.aten
CUDA = torch.device("cuda")
FROM_LISTS = (torch.tensor, torch.as_tensor, torch.asarray)
# No operation is seen of these: their bindings ask for a device first.
UNSEEN = (torch.Tensor.new_tensor, torch.Tensor.nonzero, torch.nonzero, torch.argwhere, torch.Tensor.argwhere)
TO = {aten._to_copy, aten.to}
# Their results, or the shapes of them, are on the host.
READING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}


@dataclass
class Found:
    """Waits that were found, a line each. reads: lists read from the device (`tolist`), which a test has to allow."""

    waits: list[str] = field(default_factory=list)
    reads: int = 0
    indicator: float = 0.0  # every number that is read


class _Calls(TorchFunctionMode):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UNSEEN and args[0].is_cuda:
            self.found.waits.append(func.__name__)
        out = func(*args, **(kwargs or {}))
        if func in FROM_LISTS and out.is_cuda and not any(x.is_cuda for x in _tensors(args)):
            self.found.waits.append(f"{func.__name__} of numbers on the host, straight to the device")
        return out


class _Operations(TorchDispatchMode):
    def __init__(self, found: Found) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = _tensors((args, kwargs))
        if any(x.is_cuda for x in before) and self._reads(func, args, kwargs):
            self.found.waits.append(f"{func} reads from the device")
        out = func(*args, **kwargs)
        if why := self._crosses(func.overloadpacket, args, kwargs, before, out):
            self.found.waits.append(f"{func} {why}")
        return out

    @staticmethod
    def _reads(func: Any, args: Any, kwargs: Any) -> bool:
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
        by_tensor = func in (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor)
        return func.overloadpacket in READING or (by_tensor and kwargs.get("output_size") is None)

    @staticmethod
    def _crosses(operation: Any, args: Any, kwargs: Any, before: list[Tensor], out: Any) -> str:
        if operation in TO or operation is aten.copy_:
            source, target = (args[0], out) if operation in TO else (args[1], args[0])
            if source.is_cuda == target.is_cuda:
                return ""
            waits = not (kwargs.get("non_blocking") or (operation is aten.copy_ and args[2:] == (True,)))
            if source.is_cuda:  # torch makes a non-blocking copy to the host in pinned memory of its own
                pinned = operation in TO or _is_pinned(target)
            else:
                pinned = _is_pinned(source)
            return "waits" if waits else "" if pinned else "copies by way of pageable memory"
        after = _tensors(out)
        on_host = [x for x in before if not x.is_cuda and x.dim()]  # a number travels with the launch
        return "reads the host's memory" if on_host and any(x.is_cuda for x in (*before, *after)) else ""


@contextmanager
def watching(indicator: float = 0.0) -> Iterator[Found]:
    """Watch inside `fake_cuda`, and answer every `tolist`; yields what is found."""
    found = Found(indicator=indicator)

    def tolist(x: Tensor) -> Any:
        found.reads += x.is_cuda
        return _filled(list(x.shape), True if x.dtype == torch.bool else found.indicator)

    with patch.object(FakeTensor, "tolist", tolist), _Calls(found), _Operations(found):
        yield found


def waits_of(run: Callable[[], object], indicator: float = 0.0) -> Found:
    """Return the waits of `run`, which ends at the first thing that cannot be answered without numbers."""
    with watching(indicator) as found:
        try:
            run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            found.waits.append(f"{error} needs numbers of the device")
        except RuntimeError:
            if not found.waits:
                raise
    return found


@contextmanager
def on_fake_cuda(model: Model, capability: int = 90) -> Iterator[Model]:
    """Give a model like this one, in bf16 on a device that is not there; its text encoder's rows hold no numbers."""
    vae_config, config = model.codec.vae.config, model.experts[0].config
    with (
        patch.object(torch, "inference_mode", lambda mode=True: torch.no_grad()),
        torch.no_grad(),
        fake_cuda(capability),
    ):
        with torch.device("meta"):
            experts = tuple(WanDenoiser(config) for _ in model.experts)
            vae = WanVAE(vae_config)
        for module, dtype in (*((expert, torch.bfloat16) for expert in experts), (vae, torch.float32)):
            _materialise(module, dtype)
        codec = VideoCodec(vae, device=CUDA)
        codec.lane = Lane(CUDA)
        yield replace(
            model,
            experts=experts,
            codec=codec,
            text_encoder=Rows(config.text_dim),  # type: ignore[arg-type]
            device=CUDA,
            dtype=torch.bfloat16,
        )


class Lane(CudaLane):
    """A lane that does everything but give numbers at its end."""

    def fetch(self, tensor: Tensor) -> Fetch:
        super().fetch(tensor)
        return lambda: np.zeros(tuple(tensor.shape), np.uint8)


class Rows:
    """Rows without numbers, in the text encoder's place."""

    max_tokens = 512

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode(self, prompt: str) -> Tensor:
        return torch.empty(len(prompt.split()) + 1, self.dim, device=CUDA, dtype=torch.bfloat16)

    def count_cut(self, prompt: str) -> int:
        return 0


def _materialise(module: nn.Module, dtype: torch.dtype) -> None:
    fp32 = getattr(module, "fp32_parameters", ())
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            full = next(full for full, other in module.named_parameters() if other is p)
            kept_in = torch.float32 if any(part in full for part in fp32) else dtype
            empty = torch.empty(p.shape, dtype=kept_in, device=CUDA)
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))


def _filled(shape: list[int], number: Any) -> Any:
    return [_filled(shape[1:], number) for _ in range(shape[0])] if shape else number


def _is_pinned(x: Tensor) -> bool:
    return "is_pinned" in vars(x)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
