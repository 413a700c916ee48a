# SPDX-License-Identifier: Apache-2.0
"""Counterparts of torch.nn's layers: the same names and parameters, with a mask on the weight."""

from fxslim.nn.handed_over import HandedOver as HandedOver
from fxslim.nn.handed_over import HandedOverConv1d as HandedOverConv1d
from fxslim.nn.handed_over import HandedOverConv2d as HandedOverConv2d
from fxslim.nn.handed_over import HandedOverConv3d as HandedOverConv3d
from fxslim.nn.handed_over import HandedOverConvTranspose1d as HandedOverConvTranspose1d
from fxslim.nn.handed_over import HandedOverConvTranspose2d as HandedOverConvTranspose2d
from fxslim.nn.handed_over import HandedOverConvTranspose3d as HandedOverConvTranspose3d
from fxslim.nn.handed_over import HandedOverLinear as HandedOverLinear
from fxslim.nn.mask_settings import MaskSettings as MaskSettings
from fxslim.nn.masked_attention import MaskedMultiheadAttention as MaskedMultiheadAttention
from fxslim.nn.masked_convolutions import MaskedConv1d as MaskedConv1d
from fxslim.nn.masked_convolutions import MaskedConv2d as MaskedConv2d
from fxslim.nn.masked_convolutions import MaskedConv3d as MaskedConv3d
from fxslim.nn.masked_convolutions import MaskedConvTranspose1d as MaskedConvTranspose1d
from fxslim.nn.masked_convolutions import MaskedConvTranspose2d as MaskedConvTranspose2d
from fxslim.nn.masked_convolutions import MaskedConvTranspose3d as MaskedConvTranspose3d
from fxslim.nn.masked_linear import MaskedLinear as MaskedLinear
from fxslim.nn.masked_weights import MaskedWeights as MaskedWeights
