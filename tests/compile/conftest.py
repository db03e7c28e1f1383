"""Decoders and an encoder small enough to be exported in seconds, and their exported graphs, made once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import draw_weights
from torch import Tensor, nn

from skylapse.compile.export import export
from skylapse.compile.stream import Coder, Plan
from skylapse.kernels.cpu import library
from skylapse.runtime.vae.coders import decoder_of, encoder_of
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

from .engines import BINDINGS
from .stand_in import StandIn

# Each of its parts once: exporting with free sides takes seconds a level, of which sympy takes most.
SMALL = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=(1, 2),
    temperal_downsample=(True,),
    scale_factor_temporal=2,
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.5, 0.7, 1.1, 2.0),
)
FAMILIES = {
    "2.1": SMALL | dict(scale_factor_spatial=2, num_res_blocks=0),
    "2.2": SMALL
    | dict(
        decoder_base_dim=16,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=4,
        num_res_blocks=0,
    ),
    "encoder": SMALL | dict(scale_factor_spatial=2, num_res_blocks=1, is_residual=True, dim_mult=(1, 1)),
}


def vae(family: str) -> WanVAE:
    return draw_weights(WanVAE(WanVAEConfig(**FAMILIES[family])), 0).requires_grad_(False)


class Distilled(nn.Module):
    """A tiny distilled decoder as TAEHV is built: 2-D convolutions, and blocks that see one frame of the past."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(4, 16, 3, padding=1)
        self.memory = nn.ModuleList(nn.Conv2d(32, 16, 3, padding=1) for _ in range(2))
        self.outward = nn.Conv2d(16, 3 * 16, 3, padding=1)

    def forward(self, x: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        y, new = self.inward(x.squeeze(0).transpose(0, 1)).relu(), []
        for block, index in zip(self.memory, range(2), strict=True):
            past = torch.zeros_like(y[:1]) if states is None else states[index].squeeze(0).transpose(0, 1)
            new.append(y[-1:].transpose(0, 1).unsqueeze(0))
            y = (y + block(torch.cat((torch.cat((past, y[:-1])), y), dim=1))).relu()
        y = torch.nn.functional.pixel_shuffle(self.outward(y), 4)
        return y.transpose(0, 1).unsqueeze(0), new


def distilled() -> Coder:
    module = draw_weights(Distilled(), 0).requires_grad_(False)
    return Coder("decoder", module, 4, 3, in_scale=1, out_scale=4, in_frames=1, out_frames=1)


@pytest.fixture(scope="session")
def coders() -> dict[str, Coder]:
    return {
        "2.1": decoder_of(vae("2.1")),
        "2.2": decoder_of(vae("2.2")),
        "encoder": encoder_of(vae("encoder")),
        "distilled": distilled(),
    }


@pytest.fixture(scope="session")
def exported(coders: dict[str, Coder], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Plan], Path]:
    """The folder of a coder's graphs by a plan."""
    made: dict[tuple[str, Plan], Path] = {}

    def folder(name: str, plan: Plan) -> Path:
        if (name, plan) not in made:
            path = tmp_path_factory.mktemp("graphs")
            if plan.lowering == "native":
                library.build(path)
            export(coders[name], plan, path)
            made[name, plan] = path
        return made[name, plan]

    return folder


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """`tensorrt`, as far as the bindings and ONNX Runtime can play it."""
    stand_in = StandIn(BINDINGS / "api.json")
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    return stand_in


@pytest.fixture(scope="session")
def graphs(exported: Callable[[str, Plan], Path]) -> Path:
    """Those of "2.1" for any size."""
    return exported("2.1", Plan())
