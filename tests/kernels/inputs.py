"""Small inputs of every operation of torch that the kernels are registered as."""

from __future__ import annotations

from typing import Any

import torch

from skylapse.kernels import adaln, patch_embed, qk_norm_rope, rms_norm, solver_step  # noqa: F401 - registers them

NAMES = (
    "adaln",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_ungated",
    "rms_norm",
    "qk_norm_rope",
    "patch_embed",
    "unpatchify",
    "solver_step",
    "solver_step_uncorrected",
)


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of `torch.ops.skylapse.<name>`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, y, table, ids = draw(7, 24).to(dtype), draw(7, 24).to(dtype), draw(3, 6, 24), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    shift, scale, gate, *_ = table.unbind(1)
    latents = [draw(16, 2, 3, 4) for _ in range(6)]
    weights = [0.3, 0.4, 0.3, 0.1]
    return {
        "adaln": (x, shift, scale, ids, 1e-6),
        "gated_residual": (x, y, gate, ids),
        "gated_residual_adaln": (x, y, gate, shift, scale, ids, 1e-6),
        "gated_residual_adaln_ungated": (x, y, None, shift, scale, ids, 1e-6),
        "rms_norm": (x, draw(24).to(dtype), 1e-6),
        "qk_norm_rope": (draw(5, 96).to(dtype), draw(32).to(dtype), draw(32).to(dtype), draw(5, 8, 2), 2, 1e-6),
        "patch_embed": (
            [draw(3, 1, 2, 2), draw(3, 2, 4, 6)],
            draw(10, 12).to(dtype),
            draw(10).to(dtype),
            (1, 2, 2),
        ),
        "unpatchify": (draw(13, 12).to(dtype), [1, 1, 1, 2, 2, 3], [1, 2, 2]),
        "solver_step": (*latents[:3], 4.0, 0.7, weights, weights, *latents[3:4], latents[4:], draw(48, 16), draw(48)),
        "solver_step_uncorrected": (*latents[:2], None, 1.0, 0.7, [0.3, 0.7], [], None, [], None, None),
    }[name]


def operation(name: str) -> Any:
    """The overload that torch calls."""
    return getattr(torch.ops.skylapse, name.removesuffix("_uncorrected").removesuffix("_ungated")).default
