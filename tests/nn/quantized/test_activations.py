# SPDX-License-Identifier: Apache-2.0
"""Quantized activations are what formulas written out in NumPy say, of every method and grid."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fxslim.nn import ActivationQuant, LinearQAT, QuantConfig
from fxslim.nn.quantizers import activation_quantizer
from tests.nn.quantized.quantized_layers import on_grid, seeds

CLIPPED = ["ulq", "lsq", "lsq+", "pact", "min_max", "static"]
VECTOR = [-1.5, -0.5, 0.2, 2.9, 3.5]


@st.composite
def settings(draw: st.DrawFn, method: str | None = None) -> dict[str, Any]:
    """A grid of any kind, with clips around 0."""
    kind = draw(st.sampled_from(["unsigned", "signed", "symmetric"]))
    found: dict[str, Any] = {"bits": draw(st.integers(2, 16)), "method": method or draw(st.sampled_from(CLIPPED))}
    if kind != "unsigned":
        found[kind] = True
    found["fixed_min"] = kind != "symmetric" and draw(st.booleans())
    found["clip_min"] = -draw(st.floats(0.01, 8.0))
    found["clip_max"] = draw(st.floats(0.01, 8.0))
    return found


def expected_grid(config: ActivationQuant) -> tuple[float, int, int, int]:
    """Scale, zero point and ends of the grid, by hand."""
    signed = bool(config.signed or config.symmetric)
    least, most = (-(2 ** (config.bits - 1)), 2 ** (config.bits - 1) - 1) if signed else (0, 2**config.bits - 1)
    low, high = float(np.float32(config.clip_min)), float(np.float32(config.clip_max))
    if config.fixed_min or config.method == "pact":
        low = 0.0
    if config.symmetric:
        return max(high / most, low / least), 0, least, most
    scale = (high - low) / (most - least)
    return scale, int(np.round(least - low / scale)), least, most


def near_a_tie(x: np.ndarray, scale: float) -> np.ndarray:
    steps = x / scale
    return abs(abs(steps - np.floor(steps)) - 0.5) < 2e-6 * (1 + abs(steps))


@given(said=settings(), seed=seeds, shape=st.lists(st.integers(0, 5), max_size=4), training=st.booleans())
def test_grids_of_given_clips(said: dict[str, Any], seed: int, shape: list[int], training: bool) -> None:
    if said["method"] == "min_max":
        training = False
    config = ActivationQuant(**said)
    quantizer = activation_quantizer(config).train(training)
    torch.manual_seed(seed)
    x = 4 * torch.randn(shape, dtype=torch.float64)
    got = quantizer(x).detach().numpy()
    scale, zero_point, least, most = expected_grid(config)
    values = x.numpy()
    if config.method == "pact":
        values = values.clip(0)
    want = on_grid(values, scale, zero_point, least, most)
    clear = ~near_a_tie(values, scale)
    assume(abs(zero_point_before_rounding(config, scale, least) % 1 - 0.5) > 1e-3)
    np.testing.assert_allclose(got[clear], want[clear], rtol=2e-6, atol=1e-6 * scale)
    assert (abs(got - want) <= scale * 1.001).all()
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6)
    assert quantizer.zero_point.item() == zero_point


def zero_point_before_rounding(config: ActivationQuant, scale: float, least: int) -> float:
    low = 0.0 if config.fixed_min or config.method == "pact" or config.symmetric else float(config.clip_min or 0)
    return least - low / scale


@pytest.mark.parametrize("method", ["ulq", "lsq+"])
def test_the_published_vector_through_a_layer(method: str) -> None:
    """8 bits between -1 and 3: 255 steps, the zero point at -64."""
    activation = ActivationQuant(method=method, signed=True, clip_min=-1.0, clip_max=3.0)
    layer: Any = LinearQAT(1, 1, bias=False, config=QuantConfig(weight=None, activation=activation)).double()
    torch.nn.init.ones_(layer.weight)
    x = torch.tensor(VECTOR, dtype=torch.float64)[:, None].requires_grad_()
    y = layer(x)
    y.sum().backward()
    np.testing.assert_allclose(
        y.flatten().tolist(), [-1.0039216, -0.5019608, 0.2039216, 2.9019608, 2.9960784], atol=5e-8
    )
    quantizer = layer.input_quantizer
    assert quantizer.scale.item() == pytest.approx(4 / 255)
    assert quantizer.zero_point.item() == -64
    assert x.grad.flatten().tolist() == [0, 1, 1, 1, 0]
    factor = 1.0 if method == "ulq" else (5 * 127) ** -0.5
    assert quantizer.clip_max.grad.item() == pytest.approx(0.9990196 * factor, abs=1e-7)
    assert quantizer.clip_min.grad.item() == pytest.approx(1.0009804 * factor, abs=1e-7)


@pytest.mark.parametrize("fixed_min", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_min_max_follows_the_extrema(fixed_min: bool, symmetric: bool) -> None:
    config = ActivationQuant(method="min_max", averaging=0.25, fixed_min=fixed_min, symmetric=symmetric)
    quantizer: Any = activation_quantizer(config).double()
    low = high = None
    for _ in range(4):
        x = torch.randn(50, dtype=torch.float64) * 3
        y = quantizer(x)
        least, most = (0.0 if fixed_min else x.min().item()), x.max().item()
        low, high = (least, most) if low is None else (low + (least - low) / 4, high + (most - high) / 4)
        want = max(high / 127, -low / 128) if symmetric else (high - low) / 255
        assert quantizer.scale.item() == pytest.approx(want, rel=1e-12)
        grid = (quantizer.zero_point.item(), *config.grid)
        np.testing.assert_allclose(y.numpy(), on_grid(x.numpy().clip(0 if fixed_min else None), want, *grid), atol=1e-9)
        assert (y >= 0).all() or not fixed_min
    before = quantizer.scale.clone()
    quantizer.eval()(100 * x)
    quantizer.train()
    quantizer.observing = False
    quantizer(100 * x)
    assert torch.equal(quantizer.scale, before)


@given(said=settings(), seed=seeds)
def test_half_precision_stays_near(said: dict[str, Any], seed: int) -> None:
    """Clips that are no numbers of the input's dtype still clip, and learn."""
    said["bits"] = min(said["bits"], 8)
    torch.manual_seed(seed)
    x = 4 * torch.randn(64)
    for dtype in (torch.float16, torch.bfloat16):
        quantizer = activation_quantizer(ActivationQuant(**said)).train(said["method"] != "min_max")
        y = quantizer(x.to(dtype).requires_grad_())
        assert y.dtype == dtype
        wide = quantizer(x.to(dtype).float())
        torch.testing.assert_close(y.float(), wide, rtol=1e-2, atol=quantizer.scale.item() / 50)
        if said["method"] == "pact":
            y.float().sum().backward()
            high = quantizer.clip_max.item()
            assert quantizer.clip_max.grad.item() == (x.to(dtype).float() >= high).sum()
