# SPDX-License-Identifier: Apache-2.0
"""Linear layers that skip the zero blocks of their weight."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxslim.errors import ConfigError
from fxslim.kernels import block_sparse_conv2d
from fxslim.nn.block_sparse_layers import BlockSparseLayer
from fxslim.nn.deployed_layers import keep_from_fusing


class BlockSparseLinear(BlockSparseLayer):
    """``nn.Linear`` whose weight lacks its zero blocks.

    >>> from fxslim.nn import MaskedLinear
    >>> BlockSparseLinear(MaskedLinear(128, 64, pattern="cin32cout64", ratio=0.75))
    BlockSparseLinear(
      block-sparse, 1 of 4 blocks
      (weight): PackedBlocks((64, 128), 1 of 4 blocks, cin32cout64)
    )
    """

    in_features: int
    out_features: int
    settings = ("in_features", "out_features")

    def __init__(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        keep_from_fusing(self)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs)."""
        self.check_input(input)
        if not input.dim() or input.shape[-1] != self.in_features:
            raise ConfigError(
                f"{self.layer_name} takes inputs of {self.in_features} features, got shape {tuple(input.shape)}"
            )
        if not self.has_kernel(input):
            return self.dense_product(input)
        if not input.numel():
            return input.new_zeros(*input.shape[:-1], self.out_features)
        output = block_sparse_conv2d(
            input.reshape(1, 1, -1, self.in_features).contiguous(), self.weight.blocks, self.weight.places,
            self.weight.starts, self.bias, num_out=self.out_features, num_in=self.in_features, cout=self.weight.cout,
            relu=self.has_relu,
        )  # fmt: skip
        return output.reshape(*input.shape[:-1], self.out_features)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
