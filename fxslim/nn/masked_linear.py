# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a mask."""

from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.nn.masked_weights import MaskedWeights


class MaskedLinear(MaskedWeights, nn.Linear):
    """``nn.Linear`` whose weight counts where ``weight_mask`` is True.

    >>> layer = MaskedLinear(8, 2, pattern="2:4")
    >>> layer.weight_mask.sum(1)
    tensor([4, 4])
    """

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.terms())
