"""The sliding tile pattern: which tokens see each other, and that attention over it is what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels.sparse_lists import seen
from torch import Tensor

from skylapse.kernels.attention import attention
from skylapse.kernels.attention_sparse import build_layout, sparse_attention
from skylapse.kernels.sliding_tiles import Triple, sliding_tiles

CPU = torch.device("cpu")
PATTERNS = [
    ((4, 6, 8), (2, 3, 2), (1, 1, 3)),  # a grid that the tile divides
    ((5, 7, 9), (2, 3, 4), (3, 1, 1)),  # smaller tiles at every end
    ((1, 5, 5), (4, 2, 1), (1, 3, 5)),  # a tile longer than the grid
    ((3, 3, 3), (1, 1, 1), (3, 3, 1)),  # single tokens
]


def papers_mask(grid: Triple, tile: Triple, window: Triple) -> Tensor:
    """[n, n] in the grid's own order, by the paper's rule: the window's centre is kept away from the border."""
    axes = []
    for length, side, width in zip(grid, tile, window, strict=True):
        half, last = width // 2, -(-length // side) - 1
        centres = [min(max(i // side, half), max(last - half, half)) for i in range(length)]
        axes.append(torch.tensor([[abs(centre - j // side) <= half for j in range(length)] for centre in centres]))
    return torch.einsum("ad,be,cf->abcdef", *(axis.float() for axis in axes)).flatten(3).flatten(0, 2).bool()


@pytest.mark.parametrize(("grid", "tile", "window"), PATTERNS)
def test_tokens_see_those_that_the_papers_rule_says(grid: Triple, tile: Triple, window: Triple) -> None:
    order, lists = sliding_tiles(grid, tile, window)
    expected = papers_mask(grid, tile, window)
    assert torch.equal(seen(lists, 1)[0], expected[order][:, order])
    assert order.sort().values.tolist() == list(range(len(expected)))


def test_every_tile_sees_as_many_also_with_an_even_window() -> None:
    lists = sliding_tiles((6, 6, 6), (2, 2, 2), (2, 1, 3)).lists.lists[0]
    assert {len(blocks) for blocks in lists} == {2 * 1 * 3}
    assert all(tile in blocks for tile, blocks in enumerate(lists))


@pytest.mark.parametrize(("grid", "tile", "window"), PATTERNS)
def test_attention_over_the_pattern_is_masked_attention(grid: Triple, tile: Triple, window: Triple) -> None:
    """Two sequences of a pack, of two shapes; tokens go into tiles' order and back."""
    patterns = [sliding_tiles(grid, tile, window), sliding_tiles((2, 3, 5), (1, 2, 2), (1, 1, 3))]
    first, second = (len(pattern.order) for pattern in patterns)
    cu_seqlens = (0, first, first + second)
    order = torch.cat([patterns[0].order, patterns[1].order + first])
    q, k, v = torch.randn((3, first + second, 2, 16), generator=torch.Generator().manual_seed(0))
    layout = build_layout(cu_seqlens, cu_seqlens, [pattern.lists for pattern in patterns], 16, q.dtype, CPU)
    out = sparse_attention(q[order], k[order], v[order], layout)[order.argsort()]
    mask = torch.block_diag(papers_mask(grid, tile, window), papers_mask((2, 3, 5), (1, 2, 2), (1, 1, 3))).bool()
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_window_as_wide_as_the_grid_is_full_attention() -> None:
    order, lists = sliding_tiles((5, 7, 9), (2, 3, 4), (3, 9, 3))
    n = len(order)
    q, k, v = torch.randn((3, n, 2, 16), generator=torch.Generator().manual_seed(0))
    layout = build_layout((0, n), (0, n), [lists], 16, q.dtype, CPU)
    assert layout.num_pairs == n * n
    out = sparse_attention(q[order], k[order], v[order], layout)[order.argsort()]
    torch.testing.assert_close(out, attention(q, k, v, (0, n)))


def test_published_setting_sees_the_published_part() -> None:
    """Wan at 81 frames of 768 x 1280: 21 x 48 x 80 tokens; a window of 3 x 3 x 5 of 4 x 6 x 10 tiles of 6 x 8 x 8."""
    order, lists = sliding_tiles((21, 48, 80), (6, 8, 8), (3, 3, 5))
    assert len(lists.lists[0]) == 4 * 6 * 10 and {len(blocks) for blocks in lists.lists[0]} == {45}
    layout = build_layout((0, len(order)), (0, len(order)), [lists], 128, torch.bfloat16, CPU)
    assert 0.18 < layout.num_pairs / len(order) ** 2 < 0.21
    assert sliding_tiles((21, 48, 80), (6, 8, 8), (3, 3, 5)).lists is lists, "made once"


@pytest.mark.parametrize("name", ["grid", "tile", "window"])
def test_wrong_triples_are_named(name: str) -> None:
    given = {"grid": (1, 2, 3), "tile": (1, 1, 1), "window": (1, 1, 1), name: (1, 0, 1)}
    with pytest.raises(ValueError, match=rf"{name} must be three positive numbers, got \(1, 0, 1\)"):
        sliding_tiles(**given)
