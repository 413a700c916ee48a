# SPDX-License-Identifier: Apache-2.0
"""A masked layer that is quantized stays masked: zeros stay zeros, and masks are made anew as before."""

from typing import Any

import pytest
import torch

from fxslim.nn import MaskedMultiheadAttention, MultiheadAttentionQAT, QuantConfig, WeightQuant
from fxslim.patterns import check
from tests.nn.masked_layers import KINDS as MASKED
from tests.nn.quantized.quantized_layers import KINDS

METHODS = {"arq": 4, "lsq": 4, "dorefa": 4, "binary": 1}


def quantized(kind: str, method: str, **settings: Any) -> tuple[Any, Any, torch.Tensor]:
    """A masked layer, its quantized counterpart, and an input."""
    cls, arguments, shape = MASKED[kind]
    masked = cls(*arguments, pattern="2:4", **settings)
    granularity = "tensor" if method == "dorefa" else "channel"
    weight = WeightQuant(method=method, bits=METHODS[method], granularity=granularity)
    return masked, KINDS[kind][0].from_float(masked, config=QuantConfig(weight=weight)), torch.randn(shape)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_zeros_stay_zeros(kind: str, method: str, gradient: str) -> None:
    masked, layer, x = quantized(kind, method, gradient=gradient)
    assert layer.weight is masked.weight
    assert layer.weight_mask is masked.weight_mask
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).pow(2).mean().backward()
        hidden = layer.weight.grad[~layer.weight_mask]
        assert hidden.any() if gradient == "sr_ste" else not hidden.any()
        assert layer.weight.grad[layer.weight_mask].any()
        optimizer.step()
        assert not layer.computed()[~layer.weight_mask].any()
    assert layer.computed().any()
    assert "pattern=2:4" in repr(layer)
    plain = layer.to_float()
    assert type(plain) is layer.float_class
    assert torch.equal(plain.weight, layer.masked())
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert not plain._forward_pre_hooks


@pytest.mark.parametrize("kind", MASKED)
def test_masks_are_made_anew_when_they_are_due(kind: str) -> None:
    _, layer, x = quantized(kind, "arq", update_freq=2)
    assert sum(hook.__name__ == "refresh_if_due" for hook in layer._forward_pre_hooks.values()) == 1
    for batch in range(5):
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
        before = layer.weight_mask.clone()
        layer(x)
        assert torch.equal(before, layer.weight_mask) == (batch % 2 == 1)
        assert not layer.computed()[~layer.weight_mask].any()
        assert kind != "linear" or check(layer.weight_mask, "2:4").ok
    assert int(layer.num_mask_batches) == 5
    layer.eval()(x)
    assert int(layer.num_mask_batches) == 5


def test_what_is_masked_does_not_widen_the_grid() -> None:
    _, layer, x = quantized("linear", "arq")
    want = layer(x), layer.scale
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.weight_mask, 1e3)
    assert torch.equal(layer.scale, want[1])
    layer.input_quantizer.enabled = False
    assert torch.equal(layer(x), want[0])


def test_attention() -> None:
    masked = MaskedMultiheadAttention(8, 2, pattern="2:4", update_freq=1)
    layer: Any = MultiheadAttentionQAT.from_float(masked, config="int4")
    x = torch.randn(3, 2, 8)
    for _ in range(3):
        layer(x, x, x)[0].sum().backward()
        assert not layer.computed("in_proj_weight")[~layer.in_proj_weight_mask].any()
        assert not layer.in_proj_weight.grad[~layer.in_proj_weight_mask].any()
    assert int(layer.num_mask_batches) == 3
    assert (layer.to_float().in_proj_weight == 0).sum() == 96
