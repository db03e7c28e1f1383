"""The rooflines count the bytes of the tensors that an operation really has."""

from itertools import chain

import pytest
import torch
from kernels.inputs import arguments, operation
from torch.utils._pytree import tree_flatten

from skylapse.kernels import roofline

COSTS = {
    "adaln": roofline.adaln(7, 24, 4, 3),
    "gated_residual": roofline.gated_residual(7, 24, 4, 3),
    "gated_residual_adaln": roofline.gated_residual_adaln(7, 24, 4, 3),
    "rms_norm": roofline.rms_norm(7, 24, 4),
    "patch_embed": roofline.patch_embed(13, 3, (1, 2, 2), 10, 4, 4),
    "unpatchify": roofline.unpatchify(13, 3, (1, 2, 2), 4),
    "qk_norm_rope": roofline.qk_norm_rope(5, 2, 16, 4),
    "solver_step": roofline.solver_step(16, 24, 4, True, 4, 4, preview_side=4),
    "solver_step_uncorrected": roofline.solver_step(16, 24, 4, False, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    inputs = arguments(name)
    tensors = chain(tree_flatten(inputs)[0], tree_flatten(operation(name)(*inputs))[0])
    num_bytes = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
    v = 5 * 32 * 4 if name == "qk_norm_rope" else 0  # a third of its input, which it does not read
    assert COSTS[name].num_bytes == num_bytes - v


def test_patch_embedding_multiplies_as_a_matrix_product_does() -> None:
    assert roofline.patch_embed(1000, 16, (1, 2, 2), 1536, 4, 2).operations == 2 * 1000 * 64 * 1536


def test_the_slower_of_bandwidth_and_arithmetic_bounds() -> None:
    cost = roofline.Cost(num_bytes=100, operations=400)
    assert cost.intensity == 4
    assert cost.seconds(bytes_per_s=100, operations_per_s=100) == 4
    assert cost.seconds(bytes_per_s=10, operations_per_s=100) == 10
