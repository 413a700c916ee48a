# SPDX-License-Identifier: Apache-2.0
"""Masked layers whose weight others read: each kind, compiled, exported, and what users do to weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxslim
from fxslim import UnsupportedLayerError
from fxslim.nn import HandedOver, HandedOverLinear
from tests.nn.masked_layers import KINDS
from tests.sparsity.small_networks import window_net

FUNCTIONS: dict[str, Any] = {
    "linear": F.linear, "conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d,
    "transposed1d": F.conv_transpose1d, "transposed2d": F.conv_transpose2d, "transposed3d": F.conv_transpose3d,
}  # fmt: skip


class Uses(nn.Module):
    """Hands the weight of a layer to the function of its kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        cls, arguments, _ = KINDS[kind]
        self.kind, self.layer = kind, cls.float_class(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.kind](x, self.layer.weight, self.layer.bias)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_as_zeros_written_by_hand(kind: str, gradient: str) -> None:
    model, x = Uses(kind), torch.randn(KINDS[kind][2])
    plain = copy.deepcopy(model)
    weight = model.layer.weight
    fxslim.sparsify(model, "2:4", example_inputs=x, gradient=gradient)
    layer = model.layer
    assert isinstance(layer, HandedOver)
    assert isinstance(layer, KINDS[kind][0])
    with torch.no_grad():
        plain.layer.weight.mul_(layer.weight_mask)
    got, want = model(x), plain(x)
    assert torch.equal(got, want)
    assert torch.equal(layer(x), want)
    assert torch.equal(layer.to_float()(x), want)
    for one in (got, want):
        one.square().sum().backward()
    decay = layer.mask_settings.decay * ~layer.weight_mask * weight.detach()
    expected = plain.layer.weight.grad * layer.weight_mask if gradient == "zero" else plain.layer.weight.grad + decay
    torch.testing.assert_close(weight.grad, expected)
    layer.set_mask(~layer.weight_mask)
    assert not torch.allclose(model(x), want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_compiled_in_one_graph(training: bool, gradient: str) -> None:
    x = torch.randn(2, 6, 8)
    model: Any = fxslim.sparsify(window_net(), "2:4", example_inputs=x, gradient=gradient).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for net in (model, compiled):
        net(x).pow(2).sum().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    before = compiled(x)
    for net in (model, twin):
        layer = net[1].attn.qkv
        layer.set_mask(~layer.weight_mask)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)


@pytest.mark.parametrize("settings", [{}, {"update_freq": 1, "regrow": 0.1, "gradient": "sr_ste"}], ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_exported(settings: dict[str, Any], strict: bool) -> None:
    x = torch.randn(2, 6, 8)
    model = fxslim.sparsify(window_net(), "2:4", example_inputs=x, **settings).eval()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    assert {"1.attn.qkv.weight", "1.attn.qkv.weight_mask"} <= program.state_dict.keys()


def test_other_parameters_for_one_call() -> None:
    x = torch.randn(2, 6, 8)
    model = fxslim.sparsify(window_net(), "2:4", example_inputs=x)
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), other(x))


def test_made_directly_and_given_new_values() -> None:
    layer = HandedOverLinear(8, 4, pattern="2:4", update_freq=1)
    old = layer.stored().detach().clone()
    layer.reset_parameters()
    assert not (layer.stored() == old).any()
    assert torch.equal(layer.weight == 0, ~layer.weight_mask)
    layer.weight = nn.Parameter(torch.ones(4, 8))
    assert layer.stored().is_leaf
    assert int((layer.weight == 1).sum()) == 16
    layer(torch.ones(1, 8))
    assert int(layer.num_mask_batches) == 1


def test_weights_that_become_computed_are_refused() -> None:
    x = torch.randn(2, 6, 8)
    model: Any = fxslim.sparsify(window_net(), "2:4", example_inputs=x)
    nn.utils.parametrizations.weight_norm(model[1].attn.qkv)
    with pytest.raises(UnsupportedLayerError, match="weight of this Linear is no parameter any more"):
        model(x)
