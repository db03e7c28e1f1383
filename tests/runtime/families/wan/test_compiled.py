"""The compiled trunk: the same velocities, and no recompilation for packs that fit into a bucket already seen."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from compare import relative_l2
from tiny import BASE, draw_weights, save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.runtime.families.wan.compiled import MAX_COMPILED, bucket, compile_trunk
from skylapse.runtime.families.wan.denoiser import WanConfig, WanDenoiser
from skylapse.runtime.layers.pack import Sequence, build_pack


def denoiser() -> WanDenoiser:
    return draw_weights(WanDenoiser(WanConfig(**(BASE | dict(num_layers=6)))), 3)  # type: ignore[return-value]


def velocities(model: WanDenoiser, grids: list[tuple[int, int, int]], rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(grids))
    with torch.inference_mode():
        sequences = [
            Sequence(grid, (k % 3,) * grid[0], model.encode_text(torch.randn(rows + k, 64, generator=generator)))
            for k, grid in enumerate(grids)
        ]
        latents = [torch.randn(4, t, 2 * h, 2 * w, generator=generator) for t, h, w in grids]
        pack = build_pack(sequences, model.config.attention_head_dim, torch.device("cpu"))
        return model(pack, latents, torch.tensor([900.0, 500.0, 20.0]))


PACKS = [([(1, 4, 4)], 3), ([(2, 4, 4), (1, 5, 4)], 5), ([(3, 4, 4), (1, 4, 4), (1, 3, 3)], 2), ([(1, 7, 8)], 9)]


def test_buckets_of_mixed_packs_are_few_and_add_at_most_half() -> None:
    sizes = sorted({bucket(n) for n in range(1, 8193)})
    assert sizes == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
    assert all(bucket(n) >= n and (n < 64 or bucket(n) <= n * 1.5) for n in range(1, 8193))


def test_buckets_of_large_packs_add_at_most_a_sixteenth_and_can_all_be_compiled() -> None:
    sizes = {bucket(n) for n in range(8193, 262_145)}
    assert max(sizes) == 262_144 and all(n <= bucket(n) <= n * 17 / 16 for n in range(8193, 262_145))
    assert bucket(8193) == 8704 and bucket(16_385) == 17_408
    assert len(sizes) == 80 and 15 * 6 + len(sizes) * 2 <= MAX_COMPILED


# Published sizes, a branch: 704p x 121 frames, 480p x 81, and both branches; 720p x 81, and both branches.
NATIVE = {27_280: 0.014, 32_760: 0.001, 65_520: 0.001, 75_600: 0.03, 151_200: 0.03}


@pytest.mark.parametrize("num_tokens", NATIVE)
def test_published_sizes_are_padded_by_little(num_tokens: int) -> None:
    assert 0 <= bucket(num_tokens) / num_tokens - 1 < NATIVE[num_tokens]


def test_dynamo_compiles_as_many_as_there_are() -> None:
    compile_trunk(denoiser(), backend="eager")
    limits = torch._dynamo.config
    assert min(limits.recompile_limit, limits.accumulated_recompile_limit) >= MAX_COMPILED


def test_mixed_packs_are_equal_and_compile_once_a_bucket() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    plain, compiled, counter = denoiser(), denoiser(), CompileCounter()
    compile_trunk(compiled, backend=counter)
    seen: dict[int, int] = {}
    for grids, rows in PACKS * 2:
        for a, b in zip(velocities(compiled, grids, rows), velocities(plain, grids, rows), strict=True):
            assert relative_l2(a, b) < 1e-5
        size = bucket(sum(t * h * w for t, h, w in grids))
        if size in seen:
            assert counter.frame_count == seen[max(seen, key=seen.__getitem__)], "a pack of a known bucket recompiled"
        seen[size] = counter.frame_count
    assert 0 < counter.frame_count <= 7 * len(seen)  # what lies around the two attentions, frame by frame


def test_an_engine_compiles_when_its_settings_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_checkpoint("wan2.1-t2v", tmp_path))
    request = VideoRequest(prompt="a star", width=64, height=64, num_frames=5, num_inference_steps=4)
    plain = Engine.from_pretrained(folder, device="cpu").generate_latents(request)
    monkeypatch.setenv("SKYLAPSE_COMPILE", "1")
    monkeypatch.setattr("skylapse.runtime.engine.engine.compile_trunk", partial(compile_trunk, backend="eager"))
    torch._dynamo.reset()
    engine = Engine.from_pretrained(folder, device="cpu")
    assert "trunk" in vars(engine.model.experts[0])
    assert relative_l2(engine.generate_latents(request), plain) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_inductor_gives_the_same_velocities() -> None:
    import shutil

    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("inductor compiles C++ on the CPU, and there is no compiler")
    torch._dynamo.reset()
    plain, compiled = denoiser(), denoiser()
    compile_trunk(compiled)
    for grids, rows in PACKS[:2]:
        for a, b in zip(velocities(compiled, grids, rows), velocities(plain, grids, rows), strict=True):
            assert relative_l2(a, b) < 1e-5
