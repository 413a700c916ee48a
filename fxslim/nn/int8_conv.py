# SPDX-License-Identifier: Apache-2.0
"""Convolutions that multiply bytes."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxslim.nn.byte_products import PackedWeight, convolve_bytes, fits
from fxslim.nn.dequantized_layers import DequantizedConv
from fxslim.nn.image_padding import image_paddings
from fxslim.nn.int8_layers import Int8Layer


class Int8Conv2d(Int8Layer, DequantizedConv):
    """``nn.Conv2d`` without groups in integers: inputs and weights are bytes, sums have 32 bits, results are float.

    Results lie channels last, as the kernel writes them.
    """

    def integer_product(self, x: Tensor, scale: float, zero_point: int, packed: PackedWeight) -> Tensor:
        before, after = image_paddings(self)
        if before != after:
            left, right = before[1], after[1]
            x = F.pad(x, (left, right, before[0], after[0]), value=zero_point)
            before = [0, 0]
        return convolve_bytes(x, scale, zero_point, packed, self.stride, before, self.dilation)


def deployed_conv2d(layer: Any, *args: Any) -> DequantizedConv:
    """In integers where inputs and weights are bytes. Of grouped convolutions torch has fast kernels for few sizes."""
    made = Int8Conv2d(layer, *args)
    return made if layer.groups == 1 and fits(made.weight, made.input_grid) else DequantizedConv(layer, *args)
