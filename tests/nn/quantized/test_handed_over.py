# SPDX-License-Identifier: Apache-2.0
"""Weights that an owner hands to a function: weight and input are quantized, each input once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.nn import ActivationQuant, HandedOverLinearQAT, QuantConfig, WeightQuant
from fxslim.nn.handed_over_quantized import quantize_inputs_within
from fxslim.nn.placed_quantizers import place_output_quantizer

CONFIG = QuantConfig(
    weight=WeightQuant(bits=4), activation=ActivationQuant(bits=4, batch_num=2, calibration="min_max"), start_step=1
)


class Owner(nn.Module):
    """Reads the weight of a layer, by position or by keyword, once or twice; or calls the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "called":
            return self.inner(x)
        if self.how == "keywords":
            return F.linear(input=x, weight=self.inner.weight, bias=self.inner.bias)
        weight = self.inner.weight
        if self.how == "looked at twice":
            assert self.inner.weight.shape == weight.shape
        return F.linear(x, weight, self.inner.bias)


def quantized(how: str) -> Any:
    owner: Any = Owner(how)
    owner.inner = HandedOverLinearQAT.from_float(owner.inner, config=CONFIG)
    quantize_inputs_within(owner)
    return owner


@pytest.mark.parametrize("how", ["position", "keywords", "looked at twice", "called"])
@pytest.mark.parametrize("copied", [False, True])
def test_both_are_quantized(how: str, copied: bool) -> None:
    owner = quantized(how)
    if copied:
        owner = copy.deepcopy(owner)
    layer = owner.inner
    plain = layer.to_float()
    for batch in range(3):
        x = torch.randn(5, 6)
        weight = layer.stored() if batch == 0 else layer.computed()
        torch.testing.assert_close(owner(x), F.linear(x, weight, plain.bias), rtol=0, atol=0)
        assert layer.input_quantizer.batches_seen == batch + 1
    x = torch.randn(5, 6)
    want = F.linear(layer.input_quantizer(x), layer.computed(), plain.bias)
    assert torch.equal(owner(x), want)
    assert not torch.equal(want, F.linear(x, layer.computed(), plain.bias))
    owner(x).sum().backward()
    assert dict(layer.named_parameters())["weight"].grad.any()
    assert layer.input_quantizer.clip_max.grad is not None


def test_products_outside_of_the_owner_are_left_alone() -> None:
    owner, x = quantized("position"), torch.randn(5, 6)
    for _ in range(3):
        owner(x)
    seen = owner.inner.weight
    assert torch.equal(F.linear(x, seen), x @ seen.T)
    with pytest.raises(RuntimeError):
        owner(torch.randn(5, 7))
    assert torch.equal(F.linear(x, owner.inner.weight), x @ seen.T)
    assert not any("shown" in name for name in vars(owner.inner))


@pytest.mark.parametrize("build", [nn.ReLU, lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU())])
def test_quantizers_of_outputs(build: Any) -> None:
    """They go along with copies, and a Sequential runs them itself."""
    module, x = build(), torch.randn(5, 6)
    plain = copy.deepcopy(module)
    place_output_quantizer(module, ActivationQuant(bits=3, calibration="min_max"), 0, "block.act")
    assert torch.equal(module(x), plain(x))
    copied = copy.deepcopy(module)
    for one in (module, copied):
        y = one(x)
        assert not torch.equal(y, plain(x))
        assert y.unique().numel() <= 8
        assert one.output_quantizer.batches_seen == 1
        assert one.output_quantizer.described() == "the output of block.act"
