"""Lets Triton's interpreter compute Liger's kernels on a processor. To be imported before anything that imports triton, with
TRITON_INTERPRET=1.

The interpreter (triton 3.9) lacks what is added here: numbers as arguments are tensors in a kernel, bfloat16 is not a uint16 and is
rounded as GPUs do, and CUDA's own rsqrt and tanh are Triton's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
_argument, _converted, _binary = interpreter._implicit_cvt, interpreter._convert_float, Builder.binary_op


def argument(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return _argument(value)


def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
    return _converted(data, source, target, rounding)


def binary(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
    if left.dtype.scalar != tl.bfloat16:
        return _binary(self, left, right, operation)
    wide = [self.cast_impl(one, tl.float32) for one in (left, right)]
    return self.cast_impl(_binary(self, *wide, operation), tl.bfloat16)


interpreter._implicit_cvt, interpreter._convert_float, Builder.binary_op = argument, converted, binary
rms_norm.rsqrt = lambda x: tl.rsqrt(x)
geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
