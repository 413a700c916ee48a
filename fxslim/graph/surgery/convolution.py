# SPDX-License-Identifier: Apache-2.0
"""Attributes of convolutions."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxslim.graph.surgery.attributes import family


@family(_ConvNd)
def convolution_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Channels from the weight; a depthwise convolution keeps one group per input channel."""
    assert isinstance(module, _ConvNd)
    weight = tensors["weight"]
    first, second = weight.shape[:2]
    if module.groups > 1 and module.groups == module.in_channels:
        multiplier = module.out_channels // module.in_channels
        channels = first if module.transposed else first // multiplier
        return {"in_channels": channels, "out_channels": channels * multiplier, "groups": channels}
    if module.transposed:
        return {"in_channels": first, "out_channels": second * module.groups}
    return {"in_channels": second * module.groups, "out_channels": first}
