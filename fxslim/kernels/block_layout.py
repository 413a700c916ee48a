# SPDX-License-Identifier: Apache-2.0
"""How a weight without its zero blocks is stored, for the block-sparse operators.

A block is ``cout`` filters x ``cin`` input channels at one kernel position. The blocks that are not all zero lie
behind each other in the order of their filters; each is cut into panels of 16 filters, filled up with zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Filters whose weights lie beside each other.
PANEL = 16
# Input channels of one filter that lie beside each other, where weights are bytes.
QUAD = 4


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Filters and input channels of a weight, and of its blocks."""

    num_out: int
    num_in: int
    positions: int
    cin: int
    cout: int

    @classmethod
    def of(cls, shape: tuple[int, ...], cin: int, cout: int) -> "BlockSizes":
        """Blocks are at most as large as the weight."""
        return cls(
            num_out=shape[0], num_in=shape[1], positions=torch.Size(shape[2:]).numel(),
            cin=max(min(cin, shape[1]), 1), cout=max(min(cout, shape[0]), 1),
        )  # fmt: skip

    @property
    def over_filters(self) -> int:
        """Blocks beside each other."""
        return -(-self.num_out // self.cout)

    @property
    def over_channels(self) -> int:
        """Blocks below each other."""
        return -(-self.num_in // self.cin)

    @property
    def panels(self) -> int:
        """Panels of a block."""
        return -(-self.cout // PANEL)


def blocks_of(weight: Tensor, cin: int, cout: int) -> Tensor:
    """All blocks of (out, in, *kernel), as (over filters, over channels, positions, panels, cin, 16)."""
    sizes = BlockSizes.of(tuple(weight.shape), cin, cout)
    flat = weight.reshape(sizes.num_out, sizes.num_in, sizes.positions)
    more_in, more_out = -sizes.num_in % sizes.cin, -sizes.num_out % sizes.cout
    whole = F.pad(flat, (0, 0, 0, more_in, 0, more_out))
    parted = whole.reshape(sizes.over_filters, sizes.cout, sizes.over_channels, sizes.cin, sizes.positions)
    parted = F.pad(parted.permute(0, 2, 4, 3, 1), (0, -sizes.cout % PANEL))
    return parted.unflatten(4, (sizes.panels, PANEL)).permute(0, 1, 2, 4, 3, 5)


def pack_blocks(weight: Tensor, cin: int = 32, cout: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of a weight (out, in, *kernel) that are not all zero, where each belongs, and where filters begin.

    ``blocks`` are (count, panels, cin, 16); of int8 weights (count, panels, cin / 4, 16, 4). ``places`` are (count, 2):
    which block of input channels, and which kernel position. The blocks of the g-th ``cout`` filters are
    ``starts[g]`` to ``starts[g + 1]``.

    >>> weight = torch.eye(4).repeat_interleave(16, 0).repeat_interleave(32, 1)
    >>> blocks, places, starts = pack_blocks(weight, cin=32, cout=16)
    >>> blocks.shape, places.tolist(), starts.tolist()
    (torch.Size([4, 1, 32, 16]), [[0, 0], [1, 0], [2, 0], [3, 0]], [0, 1, 2, 3, 4])
    """
    blocks = blocks_of(weight.detach(), cin, cout)
    # NaN is not 0: it stays visible.
    kept = (blocks != 0).flatten(3).any(3)
    found = kept.nonzero()
    places = found[:, 1:].to(torch.int32)
    starts = F.pad(kept.flatten(1).sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packed = blocks[kept]
    if weight.dtype == torch.int8:
        packed = F.pad(packed, (0, 0, 0, -packed.shape[2] % QUAD)).unflatten(2, (-1, QUAD)).transpose(3, 4)
    return packed.contiguous(), places.contiguous(), starts


def unpack_blocks(blocks: Tensor, places: Tensor, starts: Tensor, sizes: BlockSizes) -> Tensor:
    """The weight that was packed, (out, in, positions)."""
    if blocks.dim() == 5:
        blocks = blocks.transpose(3, 4).flatten(2, 3)[:, :, : sizes.cin]
    whole = blocks.new_zeros(sizes.over_filters, sizes.over_channels, sizes.positions, *blocks.shape[1:])
    counts = starts.diff()
    # Told how many there are, compilers need no values to know it.
    numbers = torch.arange(len(counts), device=blocks.device)
    groups = torch.repeat_interleave(numbers, counts.long(), output_size=len(blocks))
    whole[groups, places[:, 0].long(), places[:, 1].long()] = blocks
    # (filters, channels, positions, panels, cin, 16) to (filters, panels, 16, channels, cin, positions)
    rows = whole.permute(0, 3, 5, 1, 4, 2).flatten(1, 2)[:, : sizes.cout].flatten(0, 1)
    return rows.flatten(1, 2)[: sizes.num_out, : sizes.num_in]
