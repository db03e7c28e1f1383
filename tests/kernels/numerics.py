"""Kernels in Triton's interpreter against the plain formulas; prints a line of JSON for each case.

Uninitialised memory is filled with NaN (255 in pixels), so an element that no program writes is a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from bf16 import bf16_products
from torch import Tensor

from skylapse.kernels import adaln, launches, patch_embed, qk_norm_rope, reference, rms_norm, solver_step

Case = Iterator[tuple[str, Tensor, Tensor]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    torch.use_deterministic_algorithms(True)
    assert getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009 - torch types it as absent
    assert torch.empty_like(torch.ones(3)).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    torch.manual_seed(0)
    bf16_products()
    for check in (norms, residuals, rms, qk, embed, unpatchify, solver):
        for name, actual, expected in check():
            assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
            actual_64, size = actual.double(), expected.double().square().mean().sqrt()
            worst = (actual_64 - expected.double()).abs().max() / size
            print(json.dumps({"case": f"{check.__name__} {name}", "dtype": str(actual.dtype), "worst": float(worst)}))


def norms() -> Case:
    for dtype in DTYPES:
        for num_tokens, dim, num_rows in ((1, 64, 1), (7, 100, 3), (5, 129, 1), (3, 1536, 2)):
            x = draw(num_tokens, 2 * dim).to(dtype)[:, :dim] * 3 + 5  # rows far from zero, and strided
            shift, scale = draw(num_rows, 6, dim).unbind(1)[:2]
            ids = torch.randint(num_rows, (num_tokens,))
            actual = adaln._adaln_triton(x, shift, scale, ids, 1e-6)
            yield f"{num_tokens}x{dim}, {num_rows} rows", actual, reference.adaln(x, shift, scale, ids, 1e-6)


def residuals() -> Case:
    for dtype in DTYPES:
        for num_tokens, dim, num_rows in ((1, 64, 1), (7, 100, 3), (3, 1536, 2)):
            x, y = draw(num_tokens, dim).to(dtype), draw(num_tokens, dim).to(dtype)
            gate, shift, scale = draw(num_rows, 6, dim).unbind(1)[:3]
            ids, weight, bias = torch.randint(num_rows, (num_tokens,)), draw(dim), draw(dim)
            name, expected = f"{num_tokens}x{dim}, {num_rows} rows", reference.gated_residual(x, y, gate, ids)
            yield name, adaln._gated_residual_triton(x, y, gate, ids), expected
            residual, normed = adaln._gated_residual_adaln_triton(x, y, gate, shift, scale, ids, 1e-6)
            yield name + ", fused", residual, expected
            yield name + ", its norm", normed, reference.adaln(residual, shift, scale, ids, 1e-6)
            assert torch.equal(normed, adaln._adaln_triton(residual, shift, scale, ids, 1e-6)), "fusing changes bits"
            residual, normed = adaln._gated_residual_adaln_triton(x, y, None, shift, scale, ids, 1e-6)
            yield name + ", without a gate", residual, x.double() + y.double()
            yield name + ", its norm", normed, reference.adaln(residual, shift, scale, ids, 1e-6)
            norm = bias.expand_as(gate), weight.expand_as(gate)  # one row for all tokens, by a stride of 0
            residual, normed = adaln._gated_residual_adaln_triton(x, y, gate, *norm, ids, 1e-6)
            yield name + ", an affine norm", normed, reference.adaln(residual, *norm, ids, 1e-6)


def rms() -> Case:
    for dtype in DTYPES:
        for num_tokens, dim in ((1, 64), (6, 97), (3, 1536)):
            x, weight = draw(num_tokens, 2 * dim).to(dtype)[:, dim:], draw(dim).to(dtype)
            yield f"{num_tokens}x{dim}", rms_norm._triton(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)


def qk() -> Case:
    for dtype in DTYPES:
        for num_tokens, num_heads, head_dim in ((1, 1, 16), (5, 3, 64), (3, 2, 96), (4, 12, 128)):
            dim = num_heads * head_dim
            qkv = draw(num_tokens, 3 * dim).to(dtype)
            angles = torch.rand(num_tokens, head_dim // 2) * 7
            pairs = torch.stack((angles.cos(), angles.sin()), -1)
            for size in (dim, head_dim):
                weights = draw(size).to(dtype), draw(size).to(dtype)
                q, k = qk_norm_rope._triton(qkv, *weights, pairs, num_heads, 1e-6)
                expected = reference.qk_norm_rope(qkv, *weights, pairs, num_heads, 1e-6)
                name = f"{num_tokens} tokens, {num_heads} heads of {head_dim}, weight {size}"
                yield name + " q", q, expected[0]
                yield name + " k", k, expected[1]


def embed() -> Case:
    ragged = [(1, 2, 2), (3, 8, 10), (2, 18, 14)]  # 1, 60 and 126 tokens: less than a tile, and a tile and a bit
    for dtype, latent_dtype in [(dtype, torch.float32) for dtype in DTYPES] + [(torch.bfloat16,) * 2]:
        for channels, dim, patch_size in ((16, 96, (1, 2, 2)), (5, 200, (1, 2, 2)), (36, 64, (1, 2, 2))):
            latents = [draw(channels, *shape).to(latent_dtype) for shape in ragged]
            latents[1] = latents[1].transpose(2, 3)  # read by their strides
            weight, bias = (draw(dim, channels * 4) / 8).to(dtype), draw(dim).to(dtype)
            actual = patch_embed._patch_embed_triton(latents, weight, bias, patch_size)
            rounded = [x.to(dtype) for x in latents]
            yield f"{channels} channels, dim {dim}", actual, reference.patch_embed(rounded, weight, bias, patch_size)
    latents, weight, bias = [draw(3, 4, 6, 9), draw(3, 2, 3, 3)], draw(33, 54), draw(33)
    expected = reference.patch_embed(latents, weight, bias, (2, 3, 3))
    yield "odd patches", patch_embed._patch_embed_triton(latents, weight, bias, (2, 3, 3)), expected
    launch = dict(block_m=32, block_n=16, block_k=32, num_warps=4, num_stages=1)
    with launches.forced("patch_embed", launch):
        yield "other tiles", patch_embed._patch_embed_triton(latents, weight, bias, (2, 3, 3)), expected
    latents = [draw(3, 1, 2 * (1 + i % 3), 2) for i in range(35)]  # more than two launches take
    weight, bias = draw(16, 12), draw(16)
    expected = reference.patch_embed(latents, weight, bias, (1, 2, 2))
    yield "35 requests", patch_embed._patch_embed_triton(latents, weight, bias, (1, 2, 2)), expected


def unpatchify() -> Case:
    for dtype in DTYPES:
        for channels, patch_size in ((16, (1, 2, 2)), (3, (2, 3, 1)), (48, (1, 2, 2))):
            grids = [(1, 1, 1), (2, 5, 7), (3, 4, 8)]
            taps = patch_size[0] * patch_size[1] * patch_size[2]
            tokens = draw(167, taps * channels + 8).to(dtype)[:, : taps * channels]
            actual = patch_embed._unpatchify_triton(tokens, [n for grid in grids for n in grid], patch_size)
            expected = torch.cat([x.flatten() for x in reference.unpatchify(tokens, grids, patch_size)])
            assert torch.equal(actual.double(), expected)
            yield f"{channels} channels", actual, expected


def solver() -> Case:
    for dtype in DTYPES:
        for shape, earlier, corrects, guided in (
            ((16, 1, 1, 1), 0, False, False),
            ((16, 3, 5, 7), 2, True, True),
            ((5, 2, 8, 9), 3, True, True),
            ((48, 1, 4, 5), 1, False, True),
        ):
            latents, last, *before = (draw(*shape) for _ in range(2 + earlier))
            cond, uncond = draw(*shape).to(dtype), draw(*shape).to(dtype) if guided else None
            predictor, corrector = draw(2 + earlier).tolist(), draw(2 + earlier).tolist() if corrects else []
            preview = draw(48, shape[0]) / 8, draw(48) / 8
            inputs = latents, cond, uncond, 4.5, 0.7, predictor, corrector, last if corrects else None, before
            *actual, pixels = solver_step._triton(*inputs, *preview)
            *expected, levels = reference.solver_step(*inputs, preview)
            assert levels is not None
            for name, one, other in zip(("next", "clean", "sample"), actual, expected, strict=True):
                if name != "sample" or corrects:
                    yield f"{list(shape)}, {earlier} earlier, {dtype}: {name}", one, other
            off = (pixels.double() - levels).abs().max()
            assert off < 0.5 + 1e-3, f"a pixel is {off} levels off"
            assert solver_step._triton(*inputs, None, None)[3].numel() == 0


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


if __name__ == "__main__":
    main()
