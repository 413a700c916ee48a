# SPDX-License-Identifier: Apache-2.0
"""Convolutions that skip the zero blocks of their weight."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxslim.errors import ConfigError
from fxslim.kernels import block_sparse_conv2d
from fxslim.nn.block_sparse_layers import BlockSparseLayer
from fxslim.nn.image_padding import image_paddings


class BlockSparseConv2d(BlockSparseLayer):
    """``nn.Conv2d`` without groups, whose weight lacks its zero blocks.

    Inputs may lie in any order; those that are not channels_last are copied first. Results lie channels_last.

    >>> import torch
    >>> from torch import nn
    >>> layer = nn.Conv2d(64, 64, 3)
    >>> with torch.no_grad():
    ...     _ = layer.weight[:, :32].zero_()
    >>> sparse, x = BlockSparseConv2d(layer), torch.randn(1, 64, 8, 8)
    >>> sparse.kernel, torch.allclose(sparse(x), layer(x), atol=1e-5)
    ('block-sparse, 9 of 18 blocks', True)
    """

    in_channels: int
    out_channels: int
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: str
    settings = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width), or without the batch."""
        self.check_input(input)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ConfigError(
                f"{self.layer_name} takes inputs of {self.in_channels} channels, (batch, channels, height, width), got "
                f"shape {tuple(input.shape)}"
            )
        x = input if input.dim() == 4 else input.unsqueeze(0)
        output = self._convolved(x) if self.has_kernel(x) else self.dense_product(x)
        return output if input.dim() == 4 else output.squeeze(0)

    def _convolved(self, x: Tensor) -> Tensor:
        (top, left), (bottom, right) = image_paddings(self)
        if self.padding_mode != "zeros":
            x = F.pad(x, [left, right, top, bottom], self.padding_mode)
            top = left = bottom = right = 0
        output = block_sparse_conv2d(
            x.permute(0, 2, 3, 1).contiguous(), self.weight.blocks, self.weight.places, self.weight.starts, self.bias,
            num_out=self.out_channels, num_in=self.in_channels, cout=self.weight.cout, kernel_size=self.kernel_size,
            stride=self.stride, padding=[top, left, bottom, right], dilation=self.dilation, relu=self.has_relu,
        )  # fmt: skip
        return output.permute(0, 3, 1, 2)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        (top, left), (bottom, right) = image_paddings(self)
        x = F.pad(x, [left, right, top, bottom], self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation)
