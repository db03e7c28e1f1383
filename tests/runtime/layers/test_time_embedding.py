"""Timesteps are embedded once an expert, and what is kept of them has a bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skylapse import Engine
from skylapse.runtime.core.device import TIME_EMBEDDING_BYTES
from skylapse.runtime.families.wan.denoiser import WanConfig
from skylapse.runtime.layers.time_embedding import TimeEmbeddings
from skylapse.runtime.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return Engine.from_pretrained("demo", device="cpu").model


@torch.inference_mode()
def test_they_are_the_experts_own_and_made_once(model: Model) -> None:
    narrow = Engine.from_pretrained("demo", device="cpu", dtype="bf16").model
    two = replace(model, experts=(*model.experts, *narrow.experts))
    kept = TimeEmbeddings(two)
    for expert, denoiser in enumerate(two.experts):
        found = kept.get(expert, [900.0, 0.0])
        expected = denoiser.condition_embedder.embed_time(torch.tensor([900.0, 0.0]), denoiser.dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert kept.get(expert, (900.0, 0.0)) is found
    assert len(kept) == 2 and kept.get(0, [0.0, 900.0]) is not kept.get(0, [900.0, 0.0])


@torch.inference_mode()
def test_the_least_recently_used_leave_when_the_budget_is_spent(model: Model) -> None:
    one = 7 * model.experts[0].config.dim * 4
    kept = TimeEmbeddings(model, budget_bytes=2 * one)
    first, second = kept.get(0, [1.0]), kept.get(0, [2.0])
    assert kept.get(0, [1.0]) is first and kept.num_bytes == 2 * one
    kept.get(0, [3.0])
    assert kept.get(0, [1.0]) is first and (len(kept), kept.num_bytes) == (2, 2 * one)
    assert kept.get(0, [2.0]) is not second
    kept.get(0, [1.0, 2.0, 3.0])  # more than the budget: it is used, and goes with the next
    assert len(kept) == 1
    kept.get(0, [1.0])
    assert (len(kept), kept.num_bytes) == (1, one)


def test_the_budget_holds_two_experts_schedules_of_the_largest_model_twice_over() -> None:
    bytes_a_timestep = 7 * WanConfig().dim * 2
    assert bytes_a_timestep * 2 * 2 * 50 < TIME_EMBEDDING_BYTES
