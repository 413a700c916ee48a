# SPDX-License-Identifier: Apache-2.0
"""Layers whose inputs and weights are bytes, and that skip the zero blocks of their weight."""

from typing import Any

from torch import Tensor, nn

from fxslim.errors import UnsupportedLayerError
from fxslim.kernels import block_sparse_conv2d_int8
from fxslim.nn.byte_products import can_run, fits
from fxslim.nn.deployed_layers import DeployedLayer
from fxslim.nn.dequantized_layers import DequantizedConv, DequantizedLinear
from fxslim.nn.image_padding import image_paddings
from fxslim.nn.packed_blocks import PackedBlocks
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.nn.small_weights import SmallWeight
from fxslim.patterns import Block
from fxslim.patterns.weight_layout import layout_of


class Int8BlockSparseLayer(DeployedLayer):
    """Mixed into a layer of bytes. Where the kernel can't run the whole weight is put together in floating point.

    ``relu``: a ReLU behind the layer becomes part of it. ``num_blocks``: room for so many blocks, whose values a state
    dict brings.
    """

    weight: Any

    def __init__(
        self,
        layer: Any,
        norm: nn.Module | None = None,
        given: ActivationQuantizer | None = None,
        *,
        pattern: Block | None = None,
        relu: bool = False,
        num_blocks: int | None = None,
    ) -> None:
        small = SmallWeight.of(layer, "weight", layout_of(layer))
        packed: Any = PackedBlocks.of_bytes(small, pattern or Block(), num_blocks) if small.is_int8 else small
        super().__init__(layer, norm, given, packed)
        if not fits(small, self.input_grid) or getattr(layer, "groups", 1) != 1:
            raise UnsupportedLayerError(
                f"{type(self).__name__} takes layers without groups whose inputs and weights have at most 8 bits"
            )
        self.has_relu = relu

    @property
    def kernel(self) -> str:
        """How it computes."""
        return f"block-sparse int8, {self.weight.described()}"

    def computed(self, x: Tensor, quantizer: nn.Module | None = None) -> Tensor:
        grid: Any = quantizer or self.input_quantizer
        if not can_run(x):
            output = super().computed(x, quantizer)
            return output.relu() if self.has_relu else output
        weight, scale = self.weight, grid.scale.float()
        least, most = self.input_grid or (0, 255)
        where, settings = self.as_image(x.float())
        output = block_sparse_conv2d_int8(
            where, scale, int(grid.zero_point), least, most, weight.blocks, weight.places, weight.starts,
            scale * weight.scale.flatten().float(), None if self.bias is None else self.bias.float(),
            num_out=weight.shape[0], num_in=weight.shape[1], cout=weight.cout, cin=weight.cin, relu=self.has_relu,
            **settings,
        )  # fmt: skip
        return self.from_image(output, x).to(x.dtype)

    def as_image(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input as (batch, height, width, channels), and how a kernel moves over it."""
        raise NotImplementedError

    def from_image(self, output: Tensor, x: Tensor) -> Tensor:
        """The result in the layer's own shape."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return self.kernel + (", ReLU" if self.has_relu else "")


class Int8BlockSparseConv2d(Int8BlockSparseLayer, DequantizedConv):
    """``nn.Conv2d`` of bytes without groups, whose weight lacks its zero blocks. Results lie channels last."""

    def as_image(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        before, after = image_paddings(self)
        layer: Any = self
        settings = {name: getattr(layer, name) for name in ("kernel_size", "stride", "dilation")}
        return x.permute(0, 2, 3, 1).contiguous(), {**settings, "padding": before + after}

    def from_image(self, output: Tensor, x: Tensor) -> Tensor:
        return output.permute(0, 3, 1, 2)


class Int8BlockSparseLinear(Int8BlockSparseLayer, DequantizedLinear):
    """``nn.Linear`` of bytes, whose weight lacks its zero blocks.

    >>> import torch, fxslim
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = fxslim.sparsify(nn.Linear(128, 64), "cin32cout64", ratio=0.5)
    >>> layer = fxslim.quantize(model, "int8", data=[torch.randn(4, 128)])
    >>> x, sparse = torch.randn(4, 128), Int8BlockSparseLinear(layer)
    >>> sparse.kernel, torch.allclose(sparse(x), layer(x), atol=1e-5)
    ('block-sparse int8, 2 of 4 blocks', True)
    """

    def as_image(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x.reshape(1, 1, -1, x.shape[-1]).contiguous(), {}

    def from_image(self, output: Tensor, x: Tensor) -> Tensor:
        return output.reshape(*x.shape[:-1], -1)
