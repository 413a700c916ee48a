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
from fxslim.nn.handed_over_quantized import HandedOverLinearQAT as HandedOverLinearQAT
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
from fxslim.nn.qat_attention import MultiheadAttentionQAT as MultiheadAttentionQAT
from fxslim.nn.qat_convolutions import Conv1dQAT as Conv1dQAT
from fxslim.nn.qat_convolutions import Conv2dQAT as Conv2dQAT
from fxslim.nn.qat_convolutions import Conv3dQAT as Conv3dQAT
from fxslim.nn.qat_convolutions import ConvTranspose1dQAT as ConvTranspose1dQAT
from fxslim.nn.qat_convolutions import ConvTranspose2dQAT as ConvTranspose2dQAT
from fxslim.nn.qat_convolutions import ConvTranspose3dQAT as ConvTranspose3dQAT
from fxslim.nn.qat_embedding import EmbeddingQAT as EmbeddingQAT
from fxslim.nn.qat_linear import LinearQAT as LinearQAT
from fxslim.nn.quant_config import ActivationQuant as ActivationQuant
from fxslim.nn.quant_config import QuantConfig as QuantConfig
from fxslim.nn.quant_config import WeightQuant as WeightQuant
from fxslim.nn.quant_dialects import as_quant_config as as_quant_config
from fxslim.nn.quantized_layers import QuantizedLayer as QuantizedLayer
