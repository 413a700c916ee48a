# SPDX-License-Identifier: Apache-2.0
"""Switches of a whole model's quantizers."""

from torch import nn

from fxslim.errors import ConfigError
from fxslim.nn.quantizers import Phased, each_activation_quantizer


def _quantizers(model: nn.Module) -> list[Phased]:
    found = [module for module in model.modules() if isinstance(module, Phased)]
    if not found:
        raise ConfigError("this model has no quantizers: prepare_qat(model) or quantize(model) first")
    return found


def switch_quantizers(model: nn.Module, enabled: bool) -> nn.Module:
    """Switch all quantizers on or off; off, the model computes in float with the same weights. Returns the model.

    >>> import torch, fxslim
    >>> net = fxslim.quantize(nn.Sequential(nn.Linear(4, 4)), "w2", data=[torch.randn(2, 4)])
    >>> x, weight = torch.randn(2, 4), net[0].weight
    >>> off = switch_quantizers(net, False)(x)
    >>> torch.equal(off, nn.functional.linear(x, weight, net[0].bias))
    True
    """
    for quantizer in _quantizers(model):
        quantizer.enabled = enabled
    return model


def freeze_ranges(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Ranges stay what they are: they follow no data, and get no gradient. Returns the model.

    >>> import fxslim
    >>> net = freeze_ranges(fxslim.prepare_qat(nn.Sequential(nn.Linear(4, 4))))
    >>> net[0].input_quantizer.clip_max.requires_grad
    False
    """
    for quantizer in _quantizers(model):
        quantizer.observing = not frozen
        for parameter in quantizer.parameters():
            parameter.requires_grad_(not frozen)
    return model


def num_uncalibrated(model: nn.Module) -> int:
    """How many activations have no range yet."""
    return sum(not quantizer.is_calibrated for quantizer in each_activation_quantizer(model).values())
