# SPDX-License-Identifier: Apache-2.0
"""A weight as block-sparse layers keep it: the blocks that are not zero, and where each of them belongs."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.kernels import pack_blocks
from fxslim.kernels.block_layout import BlockSizes, empty_blocks, unpack_blocks
from fxslim.nn.quantizers.onnx_lowering import is_lowering, telling
from fxslim.nn.quantizers.real_values import real_twin, without_modes
from fxslim.nn.small_weights import SmallWeight
from fxslim.patterns import Block


class PackedBlocks(nn.Module):
    """A weight (out, in, *kernel) without its zero blocks, in the order in which the kernels read it.

    ``scale``: of whole numbers, one for each output. ``num_blocks``: make room for so many blocks, and leave the values
    to a state dict.

    >>> PackedBlocks(torch.eye(4).repeat_interleave(2, 1), Block(cin=2, cout=1))
    PackedBlocks((4, 8), 4 of 16 blocks, cin2cout1)
    """

    blocks: Tensor
    places: Tensor
    starts: Tensor
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, pattern: Block, scale: Tensor | None = None, num_blocks: int | None = None
    ) -> None:
        super().__init__()
        self.shape, self.cin, self.cout = weight.shape, pattern.cin, pattern.cout
        if num_blocks is None:
            blocks, places, starts = pack_blocks(weight, self.cin, self.cout)
        else:
            blocks, places, starts = empty_blocks(weight, self.sizes, num_blocks)
        for name, state in (("blocks", blocks), ("places", places), ("starts", starts), ("scale", scale)):
            self.register_buffer(name, state)

    @classmethod
    def of_bytes(cls, weight: SmallWeight, pattern: Block, num_blocks: int | None = None) -> "PackedBlocks":
        """A weight of whole numbers of at most 8 bits."""
        return cls(weight.rows(), pattern, weight.scale, num_blocks)

    @property
    def sizes(self) -> BlockSizes:
        """Filters and input channels of the weight, and of its blocks."""
        return BlockSizes.of(tuple(self.shape), self.cin, self.cout)

    @property
    def num_blocks(self) -> int:
        """Blocks that are kept."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, or of the scales of whole numbers."""
        return self.blocks.dtype if self.scale is None else self.scale.dtype

    @property
    def scale_of_outputs(self) -> Tensor | None:
        """Of whole numbers, one each."""
        return None if self.scale is None else self.scale.flatten()

    def multiply_outputs(self, factors: Tensor) -> None:
        """Each output times its factor, which becomes part of the scale of whole numbers."""
        if self.scale is None:
            raise ConfigError("blocks of floating-point numbers have no scale: multiply the weight before it is packed")
        self.scale = self.scale * factors.to(self.scale.dtype)[:, None]

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.blocks.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved flat: ``model.to(memory_format=torch.channels_last)`` is not for tensors of blocks."""

        def flat(state: Tensor) -> Tensor:
            row = state.flatten()
            moved = fn(row)
            return state if moved is row else moved.reshape(state.shape)

        return super()._apply(flat, recurse)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in floating point; a file of ONNX gets it as a constant."""
        if is_lowering():
            with without_modes(), telling(), torch.no_grad():
                return real_twin(self)._whole(dtype)
        return self._whole(dtype)

    def _whole(self, dtype: torch.dtype) -> Tensor:
        weight = unpack_blocks(self.blocks, self.places, self.starts, self.sizes).reshape(self.shape)
        if self.scale is not None:
            weight = weight.to(torch.promote_types(dtype, self.scale.dtype))
            weight = weight * self.scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(dtype)

    def described(self) -> str:
        """How many blocks are kept."""
        return f"{self.num_blocks} of {self.sizes.num_blocks} blocks"

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.described()}, cin{self.cin}cout{self.cout}"
