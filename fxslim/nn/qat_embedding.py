# SPDX-License-Identifier: Apache-2.0
"""Embeddings for quantization-aware training: the table is quantized, one scale for each row."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import DtypeError, UnsupportedLayerError
from fxslim.nn.dequantized_layers import DequantizedEmbedding
from fxslim.nn.masked_weights import MaskedWeights
from fxslim.nn.quant_config import QuantConfig
from fxslim.nn.quantized_layers import QuantizedLayer
from fxslim.nn.quantizers import ActivationQuantizer


class _ComputedEmbedding(MaskedWeights, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.computed(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class EmbeddingQAT(QuantizedLayer, _ComputedEmbedding):
    """``nn.Embedding`` with a quantized table; its indices are not quantized."""

    float_class = nn.Embedding

    def check_layer(self) -> None:
        super().check_layer()
        for name in ("max_norm", "sparse"):
            value = getattr(self, name)
            if value:
                raise UnsupportedLayerError(
                    f"{type(self).__name__}: {name}={value!r} is for a table that is read as it is stored: leave the "
                    "layer in float"
                )

    @classmethod
    def checked_config(cls, config: Any) -> QuantConfig:
        return replace(super().checked_config(config), activation=None)

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        return DequantizedEmbedding(self, norm, given)

    def check_call(self, input: Tensor) -> None:
        if input.is_floating_point():
            raise DtypeError(f"{type(self).__name__} takes indices, got {input.dtype}")
        super().check_call(self.stored())
