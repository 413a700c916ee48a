# SPDX-License-Identifier: Apache-2.0
"""Attributes of recurrent layers."""

from typing import Any

from torch import Tensor, nn

from fxslim.graph.surgery.attributes import family


@family(nn.RNNBase)
def recurrent_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Input features, hidden channels and projected ones from the first layer's weights."""
    inputs, hidden = tensors["weight_ih_l0"], tensors["weight_hh_l0"]
    gates = {"LSTM": 4, "GRU": 3}.get(str(module.mode), 1)
    sizes = {"input_size": inputs.shape[1], "hidden_size": len(hidden) // gates}
    return {**sizes, "proj_size": hidden.shape[1]} if module.proj_size else sizes


@family(nn.RNNCellBase)
def cell_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Input features and hidden channels from the weights."""
    return {"input_size": tensors["weight_ih"].shape[1], "hidden_size": tensors["weight_hh"].shape[1]}
