# SPDX-License-Identifier: Apache-2.0
"""Deployed layers that compute in floating point: torch has no integer kernel for them, or their inputs are float."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import DtypeError
from fxslim.nn.deployed_layers import DeployedLayer


class DequantizedLinear(DeployedLayer):
    """``nn.Linear`` with a weight of small numbers.

    >>> from fxslim.nn import LinearQAT
    >>> layer = LinearQAT(8, 2, config="w4").to_deploy()
    >>> layer.weight
    SmallWeight((2, 8), int4)
    """

    settings = ("in_features", "out_features")

    def computed(self, x: Tensor, quantizer: nn.Module | None = None) -> Tensor:
        if self.weight.scale.shape[1] > 1 or self.input_quantizer is not None:
            return super().computed(x, quantizer)
        # Scaling the result costs less than scaling the weight.
        scale, bias = self.weight.scale.flatten().to(x.dtype), self.bias
        result = F.linear(x, self.weight.rows().to(x.dtype)) * scale
        return result if bias is None else result + bias.to(x.dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class DequantizedConv(DeployedLayer):
    """A convolution of any kind, plain or transposed."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int
    settings = ("stride", "padding", "dilation", "groups", "in_channels", "out_channels", "kernel_size")

    def __init__(self, layer: Any, *args: Any) -> None:
        super().__init__(layer, *args)
        self.num_dims = len(layer.kernel_size)
        self.transposed = layer.transposed
        self.output_padding = layer.output_padding

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None:
            return super().forward(input)
        self.check_input(input)
        x = input if self.input_quantizer is None or self.input_is_given else self.input_quantizer(input)
        output = self._transposed(x, self.weight(x.dtype), self.bias, self._padding_for(x, output_size))
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            return self._transposed(x, weight, bias, self.output_padding)
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[self.num_dims - 1]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Any) -> Tensor:
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.num_dims - 1]
        return function(x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)

    def _padding_for(self, x: Tensor, output_size: list[int]) -> list[int]:
        find: Any = torch.nn.modules.conv._ConvTransposeNd._output_padding
        return find(self, x, output_size, self.stride, self.padding, self.kernel_size, self.num_dims, self.dilation)


class DequantizedEmbedding(DeployedLayer):
    """``nn.Embedding`` with a table of small numbers, of which only the rows that are asked for are made."""

    settings = ("num_embeddings", "embedding_dim", "padding_idx")

    def __init__(self, layer: Any, *args: Any) -> None:
        super().__init__(layer, *args)
        self.dtype = layer.stored().dtype

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point():
            raise DtypeError(f"{type(self).__name__} takes indices, got {input.dtype}")
        output = self.weight.at(input, self.dtype)
        return output if self.output_quantizer is None else self.output_quantizer(output)
