"""bf16 in Triton's interpreter: a patch for the scripts that run in it, and import this from their own folder."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bf16_products() -> None:
    """The interpreter hands bf16's bit patterns to numpy in tl.dot (triton-lang/triton#11584): multiply the numbers."""
    original = interpreter.InterpreterBuilder.create_dot

    def numbers(x: interpreter.TensorHandle) -> np.ndarray:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        if a.dtype.scalar != tl.bfloat16:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(numbers(a), numbers(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
