# SPDX-License-Identifier: Apache-2.0
"""Gradients of clips, scales, weights and inputs are the published ones, in float64."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim.nn import ActivationQuant, LinearQAT, QuantConfig
from fxslim.nn.quantizers import activation_quantizer
from tests.nn.quantized.quantized_layers import as_groups, plain_layers, rows_of, seeds, weights_only

ends = st.tuples(st.floats(-4, -0.1), st.floats(0.1, 4))


def passed(config: ActivationQuant, seed: int, size: int = 40) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A quantizer after a backward, the input, its gradient, and the gradient that came."""
    torch.manual_seed(seed)
    quantizer = activation_quantizer(config).double()
    x = 3 * torch.randn(2, size, dtype=torch.float64).requires_grad_()
    x.retain_grad()
    y = quantizer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    return quantizer, x.detach().numpy(), x.grad.numpy(), direction.numpy()


def clip_gradients(x: np.ndarray, g: np.ndarray, low: float, high: float, config: ActivationQuant) -> Any:
    """ULQ's: of the input, the lower and the upper clip."""
    least, most = config.grid
    scale = (high - low) / (most - least)
    zero_point = np.round(least - low / scale)
    up, down = x > scale * (most - zero_point), x < scale * (least - zero_point)
    t = np.where(up, high / scale, np.where(down, low / scale, x / scale))
    e = (np.round(t) - t) / (most - least)
    return g * ~(up | down), (g * (down - e)).sum(), (g * (e + up)).sum()


@given(ends=ends, bits=st.integers(2, 16), signed=st.booleans(), fixed=st.booleans(), plus=st.booleans(), seed=seeds)
def test_learned_clips(ends: tuple[float, float], bits: int, signed: bool, fixed: bool, plus: bool, seed: int) -> None:
    low, high = ends
    config = ActivationQuant(
        method="lsq+" if plus else "ulq", bits=bits, signed=signed, fixed_min=fixed, clip_min=low, clip_max=high
    )
    quantizer, x, got, g = passed(config, seed)
    low, high = 0.0 if fixed else quantizer.clip_min.item(), quantizer.clip_max.item()
    grad_x, grad_low, grad_high = clip_gradients(x, g, low, high, config)
    factor = (x.size * config.grid[1]) ** -0.5 if plus else 1.0
    np.testing.assert_allclose(got, grad_x, rtol=1e-12)
    np.testing.assert_allclose(quantizer.clip_max.grad.item(), factor * grad_high, rtol=1e-9, atol=1e-11)
    if fixed:
        assert "clip_min" not in dict(quantizer.named_parameters())
    else:
        np.testing.assert_allclose(quantizer.clip_min.grad.item(), factor * grad_low, rtol=1e-9, atol=1e-11)


@given(high=st.floats(0.1, 4), bits=st.integers(2, 16), seed=seeds)
def test_a_symmetric_clip(high: float, bits: int, seed: int) -> None:
    """One parameter for both ends, the lower one a step further out."""
    config = ActivationQuant(bits=bits, symmetric=True, clip_min=-high, clip_max=high)
    quantizer, x, got, g = passed(config, seed)
    least, most = config.grid
    scale = quantizer.clip_max.item() / most
    up, down = x > scale * most, x < scale * least
    slope = np.where(up, most, np.where(down, least, np.round(x / scale) - x / scale))
    np.testing.assert_allclose(got, g * ~(up | down), rtol=1e-12)
    np.testing.assert_allclose(quantizer.clip_max.grad.item(), (g * slope).sum() / most, rtol=1e-9, atol=1e-11)


@given(ends=ends, bits=st.integers(2, 16), symmetric=st.booleans(), seed=seeds)
def test_a_learned_scale(ends: tuple[float, float], bits: int, symmetric: bool, seed: int) -> None:
    config = ActivationQuant(method="lsq", bits=bits, symmetric=symmetric, clip_min=ends[0], clip_max=ends[1])
    quantizer, x, got, g = passed(config, seed)
    scale, zero_point = quantizer.scale.item(), quantizer.zero_point.item()
    least, most = config.grid
    low, high = least - zero_point, most - zero_point
    steps = np.round(x / scale)
    slope = np.where(steps < low, low, np.where(steps > high, high, steps - x / scale))
    np.testing.assert_allclose(got, g * ((steps >= low) & (steps <= high)), rtol=1e-12)
    want = (g * slope).sum() * (x.size * most) ** -0.5
    np.testing.assert_allclose(quantizer.scale.grad.item(), want, rtol=1e-9, atol=1e-11)


@given(high=st.floats(0.1, 4), bits=st.integers(2, 16), signed=st.booleans(), seed=seeds)
def test_pact(high: float, bits: int, signed: bool, seed: int) -> None:
    config = ActivationQuant(method="pact", bits=bits, signed=signed, clip_min=-1.0, clip_max=high)
    quantizer, x, got, g = passed(config, seed)
    alpha = quantizer.clip_max.item()
    np.testing.assert_allclose(got, g * ((x > 0) & (x < alpha)), rtol=1e-12)
    np.testing.assert_allclose(quantizer.clip_max.grad.item(), (g * (x >= alpha)).sum(), rtol=1e-9, atol=1e-11)


def test_pact_at_the_clip_itself() -> None:
    """x == alpha counts for alpha, wholly."""
    quantizer: Any = activation_quantizer(ActivationQuant(method="pact", clip_min=-1.0, clip_max=2.0))
    x = torch.tensor([1.0, 2.0, 2.0, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.clip_max.grad.item() == 3
    assert x.grad.tolist() == [1, 0, 0, 0]


@given(case=plain_layers(), bits=st.integers(2, 16), granularity=st.sampled_from(["tensor", "channel", "group"]))
def test_learned_scales_of_weights(case: Any, bits: int, granularity: str) -> None:
    plain, cls, _, _ = case
    size = {"group_size": 2} if granularity == "group" else {}
    config = weights_only(method="lsq", bits=bits, granularity=granularity, **size)
    layer: Any = cls.from_float(plain, config=config)
    layer.computed()
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        quantizer.scale.mul_(0.4 + torch.rand_like(quantizer.scale))
    shown = layer.computed()
    direction = torch.randn_like(shown)
    shown.backward(direction)
    w = as_groups(rows_of(layer, plain.weight), config.weight)
    g = as_groups(rows_of(layer, direction), config.weight)
    s, least, most = quantizer.scale.detach().numpy()[:, None], *config.weight.grid
    steps = np.round(w / s)
    slope = np.where(steps < least, least, np.where(steps > most, most, steps - w / s))
    want = (g * slope).sum(1) * (w.shape[1] * most) ** -0.5
    np.testing.assert_allclose(quantizer.scale.grad.numpy(), want, rtol=1e-9, atol=1e-11)
    got = as_groups(rows_of(layer, plain.weight.grad), config.weight)
    np.testing.assert_allclose(got, g * ((steps >= least) & (steps <= most)), rtol=1e-12)


@given(seed=seeds, bits=st.integers(2, 8))
def test_dorefa_and_binary(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    for config in (
        weights_only(method="dorefa", bits=bits, granularity="tensor"),
        weights_only(method="binary", bits=1),
    ):
        layer: Any = LinearQAT(6, 3, config=config, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.mul_(5)
        shown, plain = layer.computed(), layer.weight.detach().clone().requires_grad_()
        direction = torch.randn_like(shown)
        shown.backward(direction)
        (plain.tanh() / plain.tanh().abs().max() if config.weight.method == "dorefa" else plain.clamp(-1, 1)).backward(
            direction
        )
        torch.testing.assert_close(layer.weight.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_of_a_whole_layer_by_the_chain_rule() -> None:
    """Input and weight quantized: each sees the other's quantized values."""
    activation = ActivationQuant(clip_min=-3.0, clip_max=3.0)
    layer: Any = LinearQAT(6, 3, config=QuantConfig(activation=activation), dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64).clamp(-2.9, 2.9).requires_grad_()
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    seen = layer.input_quantizer(x.detach()).detach()
    torch.testing.assert_close(x.grad, direction @ layer.computed().detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, direction.T @ seen, rtol=0, atol=1e-12)
