# SPDX-License-Identifier: Apache-2.0
"""Products of bytes: what oneDNN's integer kernels need, and what keeps their sums exact.

CPUs without VNNI (and without AMX) add two neighbouring products in 16 bits, which can cut them off. There a weight
that is too large for that is computed with in two halves, which doubles the work.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fxslim.nn.small_weights import SmallWeight

_MOST_IN_16_BITS = 32767
_MOST_IN_32_BITS = 2**31 - 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

EXACT, IN_HALVES, NONE = "int8", "int8 in two halves", "float"


@functools.cache
def sums_of_this_cpu() -> str:
    """ "wide" where sums are made in 32 bits, "narrow" where two products are added in 16, "none" without kernels."""
    x, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    try:
        found = _linear(x, 1.0, 0, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16), None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return "none"
    return "wide" if bool((found == 64 * 255 * 127).all()) else "narrow"


def kernel_for(weight: SmallWeight, grid: tuple[int, int]) -> str:
    """Which kernel multiplies this weight with inputs on a grid of bytes."""
    sums = sums_of_this_cpu()
    if sums == "none":
        return NONE
    if sums == "wide" or weight.values.is_meta:
        return EXACT
    return IN_HALVES if 2 * (grid[1] - grid[0]) * _most(weight) > _MOST_IN_16_BITS else EXACT


def fits(weight: SmallWeight, grid: tuple[int, int] | None) -> bool:
    """Whether inputs and weights are bytes, few enough for sums of 32 bits."""
    if grid is None or not weight.is_int8 or grid[1] - grid[0] > 255:
        return False
    return weight.row_shape[1:].numel() * 255 * 128 <= _MOST_IN_32_BITS


def _most(weight: SmallWeight) -> int:
    """The largest magnitude."""
    rows = weight.rows()
    low, high = torch.aminmax(rows) if rows.numel() else (torch.zeros(()), torch.zeros(()))
    return max(-int(low), int(high))


def can_run(x: Tensor) -> bool:
    """Whether the kernels take this input; compiled and exported code computes in floating point."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0 and not torch.compiler.is_compiling()


def as_bytes(x: Tensor, scale: Tensor, zero_point: int, most: int) -> Tensor:
    """x as integers from 0 to ``most``: rounded, half to even, as fake quantization does."""
    steps = torch.div(x.float(), scale.reshape(()).float()).round_()
    return steps.add_(zero_point).clamp_(0, most).to(torch.uint8)


class PackedWeight:
    """A weight in the order in which a kernel reads it, and what it was made from."""

    def __init__(self, weight: SmallWeight, bias: Tensor | None, in_halves: bool) -> None:
        self.made_from = _states(weight, bias)
        self.in_halves = in_halves
        rows = weight.rows()
        scale = weight.scale.flatten().float()
        self.num_outputs = rows.shape[0]
        self.bias = None if bias is None else bias.float()
        if in_halves:
            half = rows >> 1
            rows, scale = torch.cat([half, rows - half]), torch.cat([scale, scale])
            if self.bias is not None:
                self.bias = torch.cat([self.bias, torch.zeros_like(self.bias)])
        self.scale = scale.contiguous()
        self.rows: Tensor | None = rows.contiguous()
        self.packed: Any = None

    def is_of(self, weight: SmallWeight, bias: Tensor | None) -> bool:
        """Whether these are still the values that it was made from."""
        now = _states(weight, bias)
        return all(a is c and b == d for (a, b), (c, d) in zip(self.made_from, now, strict=True))

    def whole(self, product: Tensor) -> Tensor:
        """The sum of both halves, which lie behind each other along dim 1."""
        if not self.in_halves:
            return product
        return product.narrow(1, 0, self.num_outputs) + product.narrow(1, self.num_outputs, self.num_outputs)


def _states(weight: SmallWeight, bias: Tensor | None) -> list[tuple[Tensor | None, int]]:
    """Tensors with their versions; those of inference mode have none."""
    kept = (weight.values, weight.scale, bias)
    return [(state, -1 if state is None or state.is_inference() else state._version) for state in kept]


def _linear(x: Tensor, scale: float, zero_point: int, packed: Any, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        x, scale, zero_point, packed, weight_scale, _zeros(weight_scale), bias, 1.0, 0, torch.float32, "none", [], ""
    )


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(scale.shape, dtype=torch.int32)


def multiply_bytes(x: Tensor, scale: float, zero_point: int, packed: PackedWeight) -> Tensor:
    """x (rows, inputs), integers, times the weight: float32."""
    if packed.packed is None:
        packed.packed, packed.rows = torch.ops.onednn.qlinear_prepack(packed.rows, None), None
    return packed.whole(_linear(x, scale, zero_point, packed.packed, packed.scale, packed.bias))


def convolve_bytes(
    x: Tensor, scale: float, zero_point: int, packed: PackedWeight, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """A convolution of integers, without groups: float32. What is padded stands for 0."""
    where = list(stride), list(padding), list(dilation)
    if packed.packed is None:
        packed.packed = torch.ops.onednn.qconv_prepack(
            packed.rows, packed.scale, scale, zero_point, *where, 1, list(x.shape)
        )
        packed.rows = None
    return packed.whole(
        torch.ops.onednn.qconv2d_pointwise(
            x, scale, zero_point, packed.packed, packed.scale, _zeros(packed.scale), packed.bias, *where, 1, 1.0, 0,
            torch.float32, "none", [], "",
        )
    )  # fmt: skip
