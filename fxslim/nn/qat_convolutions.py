# SPDX-License-Identifier: Apache-2.0
"""Convolutions for quantization-aware training, plain and transposed."""

from torch import nn

from fxslim.errors import ConfigError
from fxslim.nn.dequantized_layers import DequantizedConv
from fxslim.nn.int8_conv import deployed_conv2d
from fxslim.nn.masked_convolutions import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from fxslim.nn.quantized_layers import QuantizedLayer
from fxslim.nn.quantizers import ActivationQuantizer


class _QuantizedConvolution(QuantizedLayer):
    def check_layer(self) -> None:
        super().check_layer()
        mode = self.padding_mode
        if mode != "zeros":
            raise ConfigError(
                f"{type(self).__name__} pads with zeros, got padding_mode={mode!r}: leave the layer in float"
            )

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        return DequantizedConv(self, norm, given)


class Conv1dQAT(_QuantizedConvolution, MaskedConv1d):
    """``nn.Conv1d`` on quantized weights and inputs."""

    float_class, masked_class, input_dims = nn.Conv1d, MaskedConv1d, 3


class Conv2dQAT(_QuantizedConvolution, MaskedConv2d):
    """``nn.Conv2d`` on quantized weights and inputs.

    >>> Conv2dQAT(3, 8, kernel_size=3, config="w4a8").weight_quantizer
    ArqWeights(4 bit, per channel)
    """

    float_class, masked_class, input_dims = nn.Conv2d, MaskedConv2d, 4

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        return deployed_conv2d(self, norm, given)


class Conv3dQAT(_QuantizedConvolution, MaskedConv3d):
    """``nn.Conv3d`` on quantized weights and inputs."""

    float_class, masked_class, input_dims = nn.Conv3d, MaskedConv3d, 5


class ConvTranspose1dQAT(_QuantizedConvolution, MaskedConvTranspose1d):
    """``nn.ConvTranspose1d`` on quantized weights and inputs."""

    float_class, masked_class, input_dims = nn.ConvTranspose1d, MaskedConvTranspose1d, 3


class ConvTranspose2dQAT(_QuantizedConvolution, MaskedConvTranspose2d):
    """``nn.ConvTranspose2d`` on quantized weights and inputs."""

    float_class, masked_class, input_dims = nn.ConvTranspose2d, MaskedConvTranspose2d, 4


class ConvTranspose3dQAT(_QuantizedConvolution, MaskedConvTranspose3d):
    """``nn.ConvTranspose3d`` on quantized weights and inputs."""

    float_class, masked_class, input_dims = nn.ConvTranspose3d, MaskedConvTranspose3d, 5
