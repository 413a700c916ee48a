# SPDX-License-Identifier: Apache-2.0
"""Linear layers that multiply bytes."""

from typing import Any

from torch import Tensor

from fxslim.nn.byte_products import PackedWeight, fits, multiply_bytes
from fxslim.nn.dequantized_layers import DequantizedLinear
from fxslim.nn.int8_layers import Int8Layer


class Int8Linear(Int8Layer, DequantizedLinear):
    """``nn.Linear`` in integers: inputs and weights are bytes, sums have 32 bits, results are float.

    >>> import torch, fxslim
    >>> model = fxslim.quantize(torch.nn.Linear(8, 2), "int8", data=[torch.randn(4, 8)])
    >>> x, layer = torch.randn(4, 8), model.to_deploy()
    >>> type(layer).__name__, layer.weight
    ('Int8Linear', SmallWeight((2, 8), int8))
    >>> torch.allclose(layer(x), model(x), atol=1e-5)
    True
    """

    def integer_product(self, x: Tensor, scale: float, zero_point: int, packed: PackedWeight) -> Tensor:
        return multiply_bytes(x.reshape(-1, x.shape[-1]), scale, zero_point, packed).reshape(*x.shape[:-1], -1)


def deployed_linear(layer: Any, *args: Any, **kwargs: Any) -> DequantizedLinear:
    """In integers where inputs and weights are bytes."""
    made = Int8Linear(layer, *args, **kwargs)
    return made if fits(made.weight, made.input_grid) else DequantizedLinear(layer, *args, **kwargs)
