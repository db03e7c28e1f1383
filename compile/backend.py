"""What a backend has to offer: how it is asked whether it is there, what it builds, and how that is run.

A backend's whole world is a Coder, a Plan and a folder. `build` fills the folder (in whatever process it likes), `load`
makes of it a function of the coder's own signature, `run(x, states | None) -> (y, new states)`, where None means the
graph `first` and states mean `next`. States are tensors that the caller keeps: [1, C, T, H, W] on the backend's device,
in the plan's dtype, and what one backend returns another one takes. Eager empties the list of states that it is given
as it reads them, to free each at once; all others leave it, so that eager may do a chunk again that they fail at.
`run` may be called by one thread at a time.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .stream import Coder, Plan, Run, States


class Backend(Protocol):
    name: str
    device: torch.device
    max_any_pixels: int | None  # a side of the frames that a plan for any size takes; larger ones need their own
    workspace_bytes: int  # what a build may take of a GPU beside a chunk's tensors

    def missing(self, plan: Plan) -> str | None:
        """None where it can build and run this here; else what is missing, and how to get it. Never raises."""

    def plans(self, plan: Plan) -> Sequence[Plan]:
        """The plan as it is exported for this backend: how it is built here, then what it can run as well."""

    def options(self, plan: Plan) -> Mapping[str, Any]:
        """Of the builder, for one of its `plans`, as far as they change what it builds: part of the artifact's key."""

    def versions(self) -> Mapping[str, str]:
        """Of what builds and what runs: part of the key."""

    def bound_to(self) -> str:
        """Of the machine, what an artifact is valid for: nothing, an instruction set, a GPU's name and architecture."""

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        """Fill an empty folder; any exception is a failed build, its message the reason."""

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        """What `build` has made, ready to run."""


class Unavailable(ValueError):
    """A backend that was asked for cannot be had here; the message says what to install."""


def in_chunks(run: Run, coder: Coder, chunk: int | None) -> Run:
    """`run` of a plan whose `next` takes `chunk` latent frames, as one of any multiple of them."""
    if chunk is None:
        return run
    length = chunk * coder.in_frames

    def whole(x: Tensor, states: States | None) -> tuple[Tensor, States]:
        if states is None or x.shape[2] <= length:
            return run(x, states)
        made = []
        for part in x.split(length, dim=2):
            y, states = run(part, states)
            made.append(y)
        return torch.cat(made, dim=2), states

    return whole


def versions_of(*packages: str) -> dict[str, str]:
    """Of installed packages; one that is absent has none."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine_name(device: torch.device) -> str:
    """Of what a measurement is true for: the GPU, or the processor."""
    if device.type == "cuda":
        capability = "".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)} sm{capability}"
    return f"{platform.machine()} {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
