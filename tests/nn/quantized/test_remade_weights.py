# SPDX-License-Identifier: Apache-2.0
"""Weights that the backward makes again: the same gradients to the last bit, and nothing kept."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.nn import Conv2dQAT, LinearQAT, MultiheadAttentionQAT, QuantConfig, WeightQuant

LAYERS: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...]]] = {
    "conv": (Conv2dQAT, (3, 8, 3), (2, 3, 6, 6)),
    "linear": (LinearQAT, (8, 6), (3, 8)),
    "linear 3d": (LinearQAT, (8, 6), (2, 3, 8)),
    "attention": (MultiheadAttentionQAT, (8, 2), (3, 2, 8)),
}


def called(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "weight", [WeightQuant(), WeightQuant(method="lsq"), WeightQuant(granularity="tensor", bits=4)]
)
def test_gradients_are_the_same(kind: str, weight: WeightQuant) -> None:
    cls, arguments, shape = LAYERS[kind]
    torch.manual_seed(0)
    kept = cls(*arguments, config=QuantConfig(weight=weight))
    made = copy.deepcopy(kept)
    for part in made.modules():
        if hasattr(part, "quant_config"):
            part.quant_config = QuantConfig(weight=weight, save_memory=True)
    for _ in range(3):
        x = torch.randn(shape)
        for layer in (kept, made):
            called(layer, x).square().sum().backward()
    for (name, one), other in zip(kept.named_parameters(), made.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_weights_are_not_kept() -> None:
    config = QuantConfig(activation=None)
    layer = LinearQAT(64, 64, config=config)
    hooks = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: hooks.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert 64 * 64 in hooks
    layer.quant_config, hooks = QuantConfig(activation=None, save_memory=True), []
    output = layer(torch.randn(2, 64, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(fxslim.UnsupportedLayerError, match="changed between forward and backward"):
        output.sum().backward()
