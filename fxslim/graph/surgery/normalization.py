# SPDX-License-Identifier: Apache-2.0
"""Attributes of norms and of PReLU."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fxslim.graph.surgery.attributes import family


@family(_NormBase)
def batch_norm_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Channels from whichever vector there is."""
    sizes = {len(t) for t in tensors.values() if t.dim() == 1}
    return {"num_features": sizes.pop()} if sizes else {}


@family(nn.GroupNorm)
def group_norm_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Channels from the weight; the number of groups stays."""
    return {"num_channels": len(tensors["weight"])}


@family(nn.LayerNorm, nn.RMSNorm)
def layer_norm_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The shape of the weight."""
    return {"normalized_shape": tuple(tensors["weight"].shape)}


@family(nn.PReLU)
def prelu_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Slopes from the weight."""
    return {"num_parameters": len(tensors["weight"])}
