# SPDX-License-Identifier: Apache-2.0
"""The chips' published conditions, one row each."""

import pytest
from torch import nn

from fxslim import ConfigError
from fxslim.nn import MaskedConv2d
from fxslim.patterns import eligible

CONV = nn.Conv2d(64, 64, 3)
EIGHT_BIT, WIDE = ("TX5368x", "TX5339x", "TX5335x"), ("TX5336x", "TX5256x")
WITHOUT = ("TX510x", "TX5326x", "TX5215x", "TX5239x200", "TX5239x220", "TX5239x300", "TX5112x", "TX5239x201")


@pytest.mark.parametrize("chip", [*EIGHT_BIT, *WIDE, "TX5368x_TX5339x_TX5335x", "TX5336x_TX5256x", "tx5336"])
def test_chips_with_sparsity(chip: str) -> None:
    assert eligible(chip, CONV)
    assert eligible(chip, CONV).cout == 64
    assert eligible(chip, nn.Linear(1, 1)).ok


@pytest.mark.parametrize("chip", WITHOUT)
def test_chips_without(chip: str) -> None:
    found = eligible(chip, CONV)
    assert not found
    assert found.reason.endswith("has no weight sparsity")


@pytest.mark.parametrize("chip", EIGHT_BIT)
def test_16_bits_are_too_many(chip: str) -> None:
    assert "16 bits" in eligible(chip, CONV, bits=16).reason
    assert not eligible(chip, nn.Linear(8, 8), bits=16)


@pytest.mark.parametrize("chip", WIDE)
def test_16_bits_halve_the_filters_that_must_agree(chip: str) -> None:
    assert eligible(chip, CONV, bits=16).ok
    assert eligible(chip, CONV, bits=16).cout == 32


def conv(inputs: int, height: int, width: int, stride: tuple[int, int] = (1, 1)) -> nn.Conv2d:
    return nn.Conv2d(inputs, 64, (height, width), stride=stride)


@pytest.mark.parametrize(
    "layer, eight_bit, wide",
    [
        (conv(64, 8, 8), True, True),
        (conv(64, 9, 1), False, False),
        (conv(64, 1, 9), False, False),
        (conv(1, 3, 3), False, False),
        (conv(4, 3, 3), False, False),
        (conv(4, 3, 2), True, True),
        (conv(4, 8, 1), True, True),
        (conv(4, 1, 8), False, False),
        (conv(5, 3, 3), True, False),
        (conv(5, 2, 2), True, False),
        (conv(8, 4, 4), True, False),
        (conv(8, 4, 1), True, True),
        (conv(8, 4, 5), True, True),
        (conv(9, 3, 3), True, True),
        (conv(64, 3, 3, (1, 2)), True, True),
        (conv(64, 3, 3, (4, 2)), True, True),
        (conv(64, 3, 3, (1, 3)), True, False),
        (nn.Conv1d(64, 64, 3), True, True),
        (nn.Conv1d(64, 64, 3, stride=4), True, False),
        (nn.Conv1d(3, 64, 3), False, False),
        (nn.Conv2d(64, 64, 3, groups=64), False, False),
        (nn.Linear(3, 3), True, True),
        (MaskedConv2d(64, 64, 3, pattern="2:4"), True, True),
    ],
    ids=str,
)
def test_layers(layer: nn.Module, eight_bit: bool, wide: bool) -> None:
    for chips, want in ((EIGHT_BIT, eight_bit), (WIDE, wide)):
        for chip in chips:
            found = eligible(chip, layer)
            assert found.ok == want
            assert bool(found.reason) != want


def test_errors() -> None:
    with pytest.raises(ConfigError, match="TX9999"):
        eligible("TX9999", CONV)
    with pytest.raises(ConfigError, match="chip"):
        eligible("", CONV)
    with pytest.raises(ConfigError, match="bits=4 must be 8 or 16"):
        eligible("TX5368", CONV, bits=4)


def test_other_layers_stay_dense() -> None:
    for layer in (nn.ConvTranspose2d(64, 64, 3), nn.Conv3d(64, 64, 3), nn.MultiheadAttention(64, 2)):
        found = eligible("TX5368", layer)
        assert not found
        assert found.reason.startswith(f"it is a {type(layer).__name__}: TX5368 makes Conv1d, Conv2d and linear")
