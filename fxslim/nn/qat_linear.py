# SPDX-License-Identifier: Apache-2.0
"""Linear layers for quantization-aware training."""

from torch import nn

from fxslim.nn.int8_linear import deployed_linear
from fxslim.nn.masked_linear import MaskedLinear
from fxslim.nn.quantized_layers import QuantizedLayer
from fxslim.nn.quantizers import ActivationQuantizer


class LinearQAT(QuantizedLayer, MaskedLinear):
    """``nn.Linear`` on quantized weights and inputs.

    >>> layer = LinearQAT(8, 2, config="int8")
    >>> layer.scale.shape, layer.weight.requires_grad
    (torch.Size([2]), True)
    """

    float_class, masked_class = nn.Linear, MaskedLinear
    is_fused_by_torch = True

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        return deployed_linear(self, norm, given)
