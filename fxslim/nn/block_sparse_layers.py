# SPDX-License-Identifier: Apache-2.0
"""What layers share whose weight lacks its zero blocks: the packed weight, a bias, a ReLU that became part of them."""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.kernels.block_sparse_convolution import KERNEL_DTYPES
from fxslim.nn.bias_grids import folded_bias
from fxslim.nn.deployed_layers import DeployedLayer
from fxslim.nn.masked_weights import MaskedWeights
from fxslim.nn.norm_folding import folded_norm
from fxslim.nn.packed_blocks import PackedBlocks
from fxslim.nn.quantizers.onnx_lowering import is_lowering
from fxslim.patterns import Block

logger = logging.getLogger(__name__)


class BlockSparseLayer(nn.Module):
    """Computes with the blocks of a weight that are not zero; made from a plain layer, or from a masked one.

    ``norm``: a batch norm behind the layer that becomes part of it; ``relu``: so does a ReLU behind it. ``num_blocks``:
    room for so many blocks, whose values a state dict brings. There are no parameters and no gradients.
    """

    # Attributes that the arithmetic needs.
    settings: ClassVar[tuple[str, ...]] = ()
    bias: Tensor | None
    input_dims = None
    check_input = DeployedLayer.check_input

    def __init__(
        self,
        layer: Any,
        norm: nn.Module | None = None,
        *,
        pattern: Block | None = None,
        relu: bool = False,
        num_blocks: int | None = None,
    ) -> None:
        super().__init__()
        if getattr(layer, "groups", 1) != 1:
            raise ConfigError(
                f"{type(self).__name__} takes layers of one group, got {layer.groups}: blocks run over all channels"
            )
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        weight = (layer.masked() if isinstance(layer, MaskedWeights) else layer.weight).detach()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if norm is not None:
            factor = folded_norm(norm)[0]
            bias = folded_bias(bias, None, None, norm).to(weight.dtype)
            weight = (weight * factor.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        self.weight = PackedBlocks(weight, pattern or Block(), num_blocks=num_blocks)
        self.register_buffer("bias", bias)
        self.has_relu = relu
        # What the log calls it.
        self.layer_name = type(self).__name__
        self.without_kernel: tuple[str, ...] = ()

    @property
    def kernel(self) -> str:
        """How it computes."""
        return f"block-sparse, {self.weight.described()}"

    def has_kernel(self, x: Tensor) -> bool:
        """Whether the kernel takes this input; else the whole weight is put together, which is said once."""
        runs = x.is_meta or x.dtype in KERNEL_DTYPES.get(x.device.type, ())
        if not is_lowering() and runs and self.weight.dtype == x.dtype:
            return True
        if not torch.compiler.is_compiling():
            self._say_dense(f"{x.dtype} on {x.device.type}")
        return False

    def _say_dense(self, what: str) -> None:
        if what not in self.without_kernel:
            self.without_kernel += (what,)
            logger.warning(
                "%s: no block-sparse kernel for %s: its whole weight is put together in each forward, which is slower "
                "than a dense layer",
                self.layer_name, what,
            )  # fmt: skip

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's arithmetic with the whole weight."""
        raise NotImplementedError

    def dense_product(self, x: Tensor) -> Tensor:
        """The same result without a kernel."""
        output = self.product(x, self.weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return output.relu() if self.has_relu else output

    def extra_repr(self) -> str:
        return self.kernel + (", ReLU" if self.has_relu else "")
