# SPDX-License-Identifier: Apache-2.0
"""Half of the integers: two products with bytes fit 16 bits."""

import pytest
import torch

from fxslim.errors import ConfigError
from fxslim.nn import LinearQAT, QuantConfig, WeightQuant


@pytest.mark.parametrize("method", ["arq", "lsq"])
@pytest.mark.parametrize("bits", [3, 8])
def test_grid(method: str, bits: int) -> None:
    plain, reduced = (WeightQuant(bits=bits, method=method, reduce_range=flag) for flag in (False, True))
    assert reduced.grid == (plain.grid[0] // 2, plain.grid[1] // 2)
    layer = LinearQAT(16, 8, config=QuantConfig(weight=reduced, activation=None))
    steps = layer.computed() / layer.scale[:, None]
    torch.testing.assert_close(steps, steps.round())
    assert int(steps.abs().max().round()) in (reduced.grid[1], -reduced.grid[0])
    if bits == 8:
        assert 2 * 255 * int(steps.abs().max().round()) < 1 << 15
    assert QuantConfig.from_dict(layer.quant_config.to_dict()) == layer.quant_config


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dorefa", "granularity": "tensor"},
        {"method": "binary", "bits": 1},
        {"bits": 2},
        {"format": "fp8_e4m3"},
    ],
)
def test_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"weight\.reduce_range is for integers of 3 bits or more"):
        WeightQuant(reduce_range=True, **settings)
    with pytest.raises(ConfigError, match=r"weight\.reduce_range must be True or False, got 1"):
        WeightQuant(reduce_range=1)
