# SPDX-License-Identifier: Apache-2.0
"""A masked layer computes what the plain one with zeros in its weight does: outputs and gradients."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim.nn import MaskedConv2d, MaskedLinear, MaskedWeights
from fxslim.patterns import NM, Unstructured
from tests.nn.masked_layers import KINDS, convolutions, gradients, patterns, plain_twin, seeds


def compare(layer: MaskedWeights, x: Tensor, arguments: dict[str, Any]) -> None:
    twin, settings = plain_twin(layer), layer.mask_settings
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = layer(inputs[0], **arguments), twin(inputs[1], **arguments)
    assert torch.equal(got, want)
    direction = torch.randn_like(got)
    got.backward(direction)
    want.backward(direction)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    mask = layer.weight_mask
    latent = layer.weight.detach()
    whole = twin.weight.grad
    expected = mask * whole if settings.gradient == "zero" else whole + settings.decay * (~mask * latent)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-12)
    if layer.bias is not None:
        assert torch.equal(layer.bias.grad, twin.bias.grad)


@given(case=convolutions())
def test_convolutions(case: tuple[MaskedWeights, Tensor, dict[str, Any]]) -> None:
    compare(*case)


@given(
    sides=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    batch=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    pattern=patterns,
    gradient=gradients,
    seed=seeds,
)
def test_linear_layers(sides, batch, bias: bool, pattern, gradient: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = MaskedLinear(*sides, bias=bias, pattern=pattern, gradient=gradient, dtype=torch.float64)
    compare(layer, torch.randn(*batch, sides[0], dtype=torch.float64), {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_under_the_mask_does_not_reach_the_output(kind: str, gradient: str, value: float, device) -> None:
    cls, arguments, shape = KINDS[kind]
    layer = cls(*arguments, pattern="2:4", gradient=gradient, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    want = layer(x)
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.weight_mask, value)
    got = layer(x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad[layer.weight_mask].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_half_precision(kind: str, dtype: torch.dtype, gradient: str, device) -> None:
    cls, arguments, shape = KINDS[kind]
    layer = cls(*arguments, pattern="2:4", gradient=gradient, device=device).to(dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert torch.equal(got, plain_twin(layer)(x))
    got.sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert layer.weight_mask.dtype == torch.bool
    fresh = cls(*arguments, pattern="2:4", gradient=gradient, device=device, dtype=dtype)
    assert (~fresh.weight_mask).sum() * 2 == fresh.weight.numel()


def test_autocast(device) -> None:
    layer = MaskedLinear(8, 4, pattern="2:4", device=device)
    x = torch.randn(3, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        got, want = layer(x), plain_twin(layer)(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.float().sum().backward()
    assert not layer.weight.grad[~layer.weight_mask].any()


def test_the_weight_that_is_used_lies_in_memory_as_its_own() -> None:
    layer = MaskedConv2d.from_float(nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last), pattern="2:4")
    assert layer.masked().is_contiguous(memory_format=torch.channels_last)
    assert layer.weight_mask.stride() == layer.weight.stride()
    moved = MaskedConv2d(8, 6, 3, pattern="2:4").to(memory_format=torch.channels_last)
    assert moved.masked().is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", NM(2, 4, 0), Unstructured(0.5, per_output=True)], ids=str)
def test_masks_lie_as_their_weights(kind: str, pattern) -> None:
    cls, arguments, _ = KINDS[kind]
    groups = {} if kind == "linear" else {"groups": 2}
    layer = cls(*arguments, **groups, pattern=pattern)
    assert layer.weight_mask.is_contiguous()
    assert layer.masked().is_contiguous()


@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_function_transforms(gradient: str) -> None:
    """torch.func takes gradients, per sample too."""
    layer = MaskedLinear(8, 4, pattern="2:4", gradient=gradient)
    state, x = dict(layer.named_parameters()), torch.randn(5, 8)

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).pow(2).sum()

    total(state, x).backward()
    together = torch.func.grad(total)(state, x)["weight"]
    torch.testing.assert_close(together, layer.weight.grad)
    each = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(state, x)["weight"]
    decay = layer.mask_settings.decay * ~layer.weight_mask * layer.weight if gradient == "sr_ste" else 0
    torch.testing.assert_close(each.sum(0) - 4 * decay, together)
