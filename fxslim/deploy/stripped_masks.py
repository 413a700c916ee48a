# SPDX-License-Identifier: Apache-2.0
"""Masked layers that become torch's own when a model is converted, and what torch's encoders must know of others."""

from collections.abc import Iterable

from torch import nn

from fxslim.graph.surgery.changes import Changes
from fxslim.nn import MaskedWeights, QuantizedLayer
from fxslim.nn.block_sparse_layers import BlockSparseLayer
from fxslim.nn.handed_over import stop_counting
from fxslim.nn.semi_structured_linear import SemiStructuredLinear
from fxslim.sparsity.baking import bake_layer


def unmask(model: nn.Module, layers: Iterable[nn.Module], changes: Changes) -> None:
    """Write zeros into the weights of these layers; quantized ones and those without masks are left as they are."""
    for layer in layers:
        if isinstance(layer, MaskedWeights) and not isinstance(layer, QuantizedLayer) and layer.weight_names:
            bake_layer(layer, changes)
    for module in model.modules():
        stop_counting(module)


def take_no_nested(model: nn.Module, changes: Changes) -> None:
    """Torch's encoder packs padded batches into nested tensors, which only its fused layers take."""
    for module in model.modules():
        sparse = any(isinstance(inner, BlockSparseLayer | SemiStructuredLinear) for inner in module.modules())
        if isinstance(module, nn.TransformerEncoder) and sparse:
            changes.set_attribute(module, "use_nested_tensor", False)
