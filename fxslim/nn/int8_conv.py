# SPDX-License-Identifier: Apache-2.0
"""Convolutions that multiply bytes."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxslim.nn.byte_products import PackedWeight, convolve_bytes, fits
from fxslim.nn.dequantized_layers import DequantizedConv
from fxslim.nn.int8_layers import Int8Layer


class Int8Conv2d(Int8Layer, DequantizedConv):
    """``nn.Conv2d`` without groups in integers: inputs and weights are bytes, sums have 32 bits, results are float.

    Results lie channels last, as the kernel writes them.
    """

    def integer_product(self, x: Tensor, scale: float, zero_point: int, packed: PackedWeight) -> Tensor:
        before, after = self._paddings()
        if before != after:
            left, right = before[1], after[1]
            x = F.pad(x, (left, right, before[0], after[0]), value=zero_point)
            before = [0, 0]
        return convolve_bytes(x, scale, zero_point, packed, self.stride, before, self.dilation)

    def _paddings(self) -> tuple[list[int], list[int]]:
        """Above and left of the image, and below and right of it."""
        layer: Any = self
        if layer.padding == "same":
            totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            return [total // 2 for total in totals], [total - total // 2 for total in totals]
        both = [0, 0] if layer.padding == "valid" else list(layer.padding)
        return both, both


def deployed_conv2d(layer: Any, *args: Any) -> DequantizedConv:
    """In integers where inputs and weights are bytes. Of grouped convolutions torch has fast kernels for few sizes."""
    made = Int8Conv2d(layer, *args)
    return made if layer.groups == 1 and fits(made.weight, made.input_grid) else DequantizedConv(layer, *args)
