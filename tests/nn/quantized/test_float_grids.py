# SPDX-License-Identifier: Apache-2.0
"""Layers on small floating-point formats: values of the format times a scale, the largest magnitude kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxslim import ConfigError
from fxslim.kernels.float_fake_quantization import FORMATS
from fxslim.nn import ActivationQuant, LinearQAT, QuantConfig, WeightQuant

formats = st.sampled_from(sorted(FORMATS))


@settings(max_examples=40, deadline=None)
@given(format=formats, granularity=st.sampled_from(["tensor", "channel", "group"]), seed=st.integers(0, 999))
def test_weights_lie_on_the_format(format: str, granularity: str, seed: int) -> None:
    torch.manual_seed(seed)
    size = 4 if granularity == "group" else None
    weight = WeightQuant(format=format, granularity=granularity, group_size=size)
    layer = LinearQAT(8, 6, config=QuantConfig(weight=weight, activation=None), dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight.mul_(10 ** torch.randint(-3, 3, (6, 1)))
    used, groups = layer.computed().detach(), {"tensor": 48, "channel": 8, "group": 4}[granularity]
    rows, stored = used.reshape(-1, groups), layer.weight.detach().reshape(-1, groups)
    numbers = rows / layer.scale.reshape(-1, 1)
    mantissa_bits, least, largest = FORMATS[format]
    steps = 2.0 ** (numbers.abs().clamp(min=2.0**least).log2().floor() - mantissa_bits)
    torch.testing.assert_close(numbers / steps, (numbers / steps).round(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.abs().amax(1), stored.abs().amax(1))
    assert float(numbers.abs().max()) <= largest * (1 + 1e-9)
    assert not used[0].any() or granularity == "tensor"
    layer.computed().sum().backward()
    assert bool((layer.weight.grad == 1).all())


@pytest.mark.parametrize("method", ["min_max", "static"])
def test_activations_follow_the_data(method: str) -> None:
    activation = ActivationQuant(format="fp8_e4m3", method=method, averaging=1.0, calibration="min_max")
    layer = LinearQAT(4, 4, config=QuantConfig(weight=None, activation=activation))
    x = torch.randn(8, 4)
    layer(x)
    layer.eval()
    scale = x.abs().max() / 448
    torch.testing.assert_close(layer.input_quantizer.scale, scale.reshape(1))
    expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(layer.input_quantizer(x), expected)


def test_formats_are_for_scales_that_cover_the_data() -> None:
    with pytest.raises(ConfigError, match=r"weight\.format='fp8_e4m3' needs method 'arq', got 'lsq'"):
        WeightQuant(format="fp8_e4m3", method="lsq")
    with pytest.raises(ConfigError, match=r"activation\.format='fp4_e2m1' needs method 'min_max' or 'static'"):
        ActivationQuant(format="fp4_e2m1")
    with pytest.raises(ConfigError, match=r"did you mean .*'fp8_e4m3'"):
        WeightQuant(format="fp8_e4m2")
