"""The demo model's world and training: scenes move as promised, words have ids, a training resumes where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VAE_22
from torch import nn

from skylapse.benchmarks.checkpoint_folder import checkpoint_tensors
from skylapse.benchmarks.demo_model.data import draw_caption, draw_given
from skylapse.benchmarks.demo_model.scenes import DIRECTIONS, draw_scenes, render
from skylapse.benchmarks.demo_model.text import build_tokenizer
from skylapse.benchmarks.demo_model.training import Average, MatrixViews, restore_state, save_state
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (96, 64)])
def test_a_moving_shape_travels_its_own_width_inside_the_frame(height: int, width: int) -> None:
    scenes = draw_scenes(200, torch.Generator().manual_seed(1))
    _, coverage = render(scenes, 17, height, width)
    coverage = coverage[:, 0]
    edge = torch.cat([coverage[:, :, (0, -1)].flatten(1), coverage[:, :, :, (0, -1)].flatten(1)], dim=1)
    assert edge.max() < 0.5  # no pixel of the border belongs to the shape; the soft fringe of a star's tip may touch it
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    area = coverage.sum((2, 3))
    x = (coverage.sum(2) * columns).sum(-1) / area
    y = (coverage.sum(3) * rows).sum(-1) / area
    travel = ((x[:, -1] - x[:, 0]).square() + (y[:, -1] - y[:, 0]).square()).sqrt()
    shape_width = coverage[:, 0].sum(1).gt(0.5).sum(-1)
    still = scenes.direction == list(DIRECTIONS).index("standing still")
    assert (travel[still] < 0.01).all()
    assert (travel[~still] >= shape_width[~still] - 1).all()  # the width is counted in whole pixels


def test_every_word_of_a_caption_has_an_id_of_its_own() -> None:
    tokenizer = build_tokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    generator = torch.Generator().manual_seed(2)
    scenes = draw_scenes(50, generator)
    captions = [draw_caption(scenes.labels(i), generator).replace("zzz", "") for i in range(50)]
    assert "" in captions
    assert all(tokenizer.unk_token_id not in tokenizer(caption).input_ids for caption in captions)
    assert tokenizer("a mauve dodecahedron").input_ids.count(tokenizer.unk_token_id) == 2


def test_half_of_the_clips_give_frames_and_never_all_of_them() -> None:
    given, lone_last = draw_given(4000, 5, torch.Generator().manual_seed(3))
    assert 0.45 < given.any(1).float().mean() < 0.55
    assert not given.all(1).any()
    assert given[lone_last, -1].all()


def test_a_training_resumes_with_the_same_next_step(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, Average, MatrixViews, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        matrices = MatrixViews([p for p in module.parameters() if p.ndim == 4])
        others = [p for p in module.parameters() if not matrices.holds(p)]
        optimizers = [torch.optim.Muon(matrices.views, lr=0.01), torch.optim.AdamW(others, lr=0.01)]
        return module, Average(module, 0.9), matrices, optimizers

    def advance(module: nn.Module, average: Average, matrices: MatrixViews, optimizers: list, step: int) -> None:
        module.zero_grad()
        module(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        matrices.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        average.update(step)

    one = begin()
    for step in range(3):
        advance(*one, step)
    save_state(tmp_path / "state.safetensors", one[0], one[1], one[3], step=3, elapsed_s=1.5)
    advance(*one, 3)
    other = begin()
    assert restore_state(tmp_path / "state.safetensors", other[0], other[1], other[3]) == {"step": 3, "elapsed_s": 1.5}
    advance(*other, 3)
    for ours, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(value, other[1].tensors[name]) for name, value in one[1].tensors.items())


def test_exported_names_are_the_checkpoint_format_s() -> None:
    from diffusers import AutoencoderKLWan

    vae = WanVAE(WanVAEConfig(**VAE_22))
    reference = AutoencoderKLWan(**VAE_22, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).state_dict()
    assert {k: v.shape for k, v in checkpoint_tensors(vae).items()} == {k: v.shape for k, v in reference.items()}
