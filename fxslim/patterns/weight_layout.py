# SPDX-License-Identifier: Apache-2.0
"""Where a layer's weight has its outputs and its inputs: patterns look at (out, in, *kernel)."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """``transposed``: the weight is (in, out of one group, *kernel), as that of a transposed convolution."""

    groups: int = 1
    transposed: bool = False

    def rows(self, weight: Tensor) -> Tensor:
        """(out, in of one group, *kernel).

        >>> from torch import zeros
        >>> WeightLayout(groups=2, transposed=True).rows(zeros(6, 4, 3)).shape
        torch.Size([8, 3, 3])
        """
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def restored(self, rows: Tensor) -> Tensor:
        """Back to the layer's own layout."""
        if not self.transposed:
            return rows
        return rows.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def layout_of(layer: nn.Module) -> WeightLayout:
    """The layout of a layer's weights."""
    if isinstance(layer, _ConvNd):
        return WeightLayout(groups=layer.groups, transposed=isinstance(layer, _ConvTransposeNd))
    return WeightLayout()
