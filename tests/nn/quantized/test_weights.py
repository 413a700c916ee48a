# SPDX-License-Identifier: Apache-2.0
"""Quantized weights are what formulas written out in NumPy say, of every method, granularity and width."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim import CalibrationError
from fxslim.nn import LinearQAT, QuantConfig, QuantizedLayer, WeightQuant
from tests.nn.quantized.quantized_layers import (
    KINDS,
    as_groups,
    on_grid,
    plain_layers,
    rows_of,
    symmetric_scales,
    weights_only,
)

Case = tuple[nn.Module, type[QuantizedLayer], Tensor, dict[str, Any]]


@st.composite
def weight_configs(draw: st.DrawFn) -> WeightQuant:
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = 2 if granularity == "group" else None
    bits, narrow, method = draw(st.integers(2, 16)), draw(st.booleans()), draw(st.sampled_from(["arq", "lsq"]))
    return WeightQuant(bits=bits, narrow=narrow, method=method, granularity=granularity, group_size=size)


@given(case=plain_layers(), config=weight_configs(), spread=st.sampled_from([1e-3, 1.0, 50.0]))
def test_integer_grids(case: Case, config: WeightQuant, spread: float) -> None:
    plain, cls, _, _ = case
    with torch.no_grad():
        plain.weight.mul_(spread)
    layer: Any = cls.from_float(plain, config=QuantConfig(weight=config, activation=None))
    lines = as_groups(rows_of(layer, plain.weight), config)
    scales = symmetric_scales(lines, config.bits, config.narrow)
    np.testing.assert_allclose(layer.scale.numpy(), scales, rtol=1e-12)
    assert layer.zero_point.shape == layer.scale.shape
    assert not layer.zero_point.any()
    got = as_groups(rows_of(layer, layer.computed()), config)
    half = 2 ** (config.bits - 1)
    want = on_grid(lines, scales[:, None], 0, -half + config.narrow, half - 1)
    # Where x / scale is a tie but for the last bit of the scale, one step either way is right.
    steps = lines / scales[:, None]
    clear = abs(abs(steps - np.floor(steps)) - 0.5) > 1e-9
    np.testing.assert_allclose(got[clear], want[clear], rtol=1e-11, atol=1e-300)
    assert (abs(got - want) <= scales[:, None] * (1 + 1e-9)).all()


@given(case=plain_layers(), bits=st.integers(2, 16))
def test_dorefa(case: Case, bits: int) -> None:
    plain, cls, _, _ = case
    layer: Any = cls.from_float(plain, config=weights_only(method="dorefa", granularity="tensor", bits=bits))
    w, n = plain.weight.detach().numpy(), 2**bits - 1
    want = 2 * np.round((np.tanh(w) / (2 * abs(np.tanh(w)).max()) + 0.5) * n) / n - 1
    np.testing.assert_allclose(layer.computed().detach().numpy(), want, rtol=0, atol=1e-12)
    odd = layer.computed().detach().numpy() / layer.scale.numpy()
    np.testing.assert_allclose(odd, np.round(odd), atol=1e-9)


@given(case=plain_layers(), granularity=st.sampled_from(["tensor", "channel", "group"]))
def test_binary(case: Case, granularity: str) -> None:
    plain, cls, _, _ = case
    size = 2 if granularity == "group" else None
    config = WeightQuant(method="binary", bits=1, granularity=granularity, group_size=size)
    layer: Any = cls.from_float(plain, config=QuantConfig(weight=config, activation=None))
    lines = as_groups(rows_of(layer, plain.weight), config)
    scales = abs(lines).mean(1)
    got = as_groups(rows_of(layer, layer.computed()), config)
    np.testing.assert_allclose(got, np.sign(lines) * scales[:, None], rtol=1e-12)
    np.testing.assert_allclose(layer.scale.numpy(), scales, rtol=1e-12)
    assert len(np.unique(abs(got[0]))) == 1


@pytest.mark.parametrize("ends, scale", [((-0.5, 1.0), 1 / 127), ((-1.0, 0.5), 1 / 128)])
def test_scales_of_the_largest_magnitude(ends: tuple[float, float], scale: float) -> None:
    """127 steps above 0, 128 below."""
    layer: Any = LinearQAT(2, 1, config=weights_only())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([ends]))
    assert layer.scale.item() == pytest.approx(scale, rel=1e-7)
    assert layer.weight_quantizer(layer.weight)[0].tolist() == pytest.approx(
        [round(end / scale) * scale for end in ends]
    )


def test_ties_round_to_even() -> None:
    layer: Any = LinearQAT(4, 1, config=weights_only(bits=4, granularity="tensor"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, 1.5, 2.5, 7.0]]))
    assert layer.computed().tolist() == [[0.0, 2.0, 2.0, 7.0]]


@pytest.mark.parametrize("method", ["arq", "lsq", "dorefa", "binary"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_the_stored_weight_is_never_written(kind: str, method: str) -> None:
    cls, arguments, shape = KINDS[kind]
    bits = 1 if method == "binary" else 3
    config = QuantConfig(weight=WeightQuant(method=method, bits=bits, granularity="tensor"))
    layer: Any = cls(*arguments, config=config)
    before = layer.weight.detach().numpy().tobytes(), layer.bias.detach().numpy().tobytes()
    for training in (True, True, False, True):
        y = layer.train(training)(torch.randn(shape))
        y.sum().backward()
    assert (layer.weight.detach().numpy().tobytes(), layer.bias.detach().numpy().tobytes()) == before
    assert not torch.equal(layer.computed(), layer.weight)


@pytest.mark.parametrize("method", ["arq", "lsq"])
def test_small_updates_add_up(method: str) -> None:
    """Steps far below the grid's: kept in the float weight, they move it in the end."""
    layer: Any = LinearQAT(4, 1, bias=False, config=weights_only(bits=2, method=method, granularity="tensor"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.2, 0.1]]))
    optimizer = torch.optim.SGD([layer.weight], lr=1e-2)
    first = layer(torch.eye(4)[2]).item()
    for _ in range(100):
        optimizer.zero_grad()
        (-layer(torch.eye(4)[2])).sum().backward()
        optimizer.step()
    assert layer(torch.eye(4)[2]).item() > first


@pytest.mark.parametrize("method", ["arq", "lsq", "dorefa", "binary"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at_first", [True, False])
def test_weights_that_are_not_finite(method: str, value: float, at_first: bool) -> None:
    bits = 1 if method == "binary" else 8
    layer: Any = LinearQAT(4, 3, config=weights_only(method=method, bits=bits, granularity="tensor"))
    layer.name_quantizers("encoder.fc")
    if not at_first:
        layer(torch.randn(2, 4))
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(CalibrationError, match=r"the weight of encoder.fc: 1 of 12 entries of \(3, 4\) are NaN or inf"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("method", ["arq", "lsq", "binary"])
def test_weights_that_are_all_zero(method: str) -> None:
    bits = 1 if method == "binary" else 8
    layer: Any = LinearQAT(4, 3, config=weights_only(method=method, bits=bits))
    nn.init.zeros_(layer.weight)
    y = layer(torch.randn(2, 4))
    assert torch.equal(y, layer.bias.expand(2, 3))
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.02])
def test_a_learned_scale_that_is_pushed_past_zero(value: float) -> None:
    layer: Any = LinearQAT(4, 3, config=weights_only(method="lsq"))
    layer(torch.randn(2, 4))
    with torch.no_grad():
        layer.weight_quantizer.scale.fill_(value)
    layer(torch.randn(2, 4)).sum().backward()
    assert (layer.scale > 0).all()
    assert layer.weight_quantizer.scale.grad.any()
