# SPDX-License-Identifier: Apache-2.0
"""Attributes of recurrent layers: their inputs may shrink, their hidden sizes stay."""

from typing import Any

from torch import Tensor, nn

from fxslim.graph.surgery.attributes import family


@family(nn.RNNBase)
def recurrent_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Input features from the first layer's weight."""
    return {"input_size": tensors["weight_ih_l0"].shape[1]}


@family(nn.RNNCellBase)
def cell_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Input features from the weight."""
    return {"input_size": tensors["weight_ih"].shape[1]}
