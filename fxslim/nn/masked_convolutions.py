# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a mask, plain and transposed."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import UnsupportedLayerError
from fxslim.nn.masked_weights import MaskedWeights


class MaskedConv1d(MaskedWeights, nn.Conv1d):
    """``nn.Conv1d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.terms())


class MaskedConv2d(MaskedWeights, nn.Conv2d):
    """``nn.Conv2d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.terms())


class MaskedConv3d(MaskedWeights, nn.Conv3d):
    """``nn.Conv3d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.terms())


class _MaskedTransposed(MaskedWeights):
    _compute: ClassVar[Any]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        if layer.padding_mode != "zeros":
            raise UnsupportedLayerError(f"{type(self).__name__}: padding_mode {layer.padding_mode!r}, not 'zeros'")
        dims = len(layer.kernel_size)
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        return type(self)._compute(
            input, *self.terms(), layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class MaskedConvTranspose1d(_MaskedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.ConvTranspose1d
    _compute = staticmethod(F.conv_transpose1d)


class MaskedConvTranspose2d(_MaskedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.ConvTranspose2d
    _compute = staticmethod(F.conv_transpose2d)


class MaskedConvTranspose3d(_MaskedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose weight counts where ``weight_mask`` is True."""

    float_class = nn.ConvTranspose3d
    _compute = staticmethod(F.conv_transpose3d)
