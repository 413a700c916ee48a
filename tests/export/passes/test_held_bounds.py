# SPDX-License-Identifier: Apache-2.0
"""Relu and Clip go where the grid does the same; elsewhere they stand behind the quantizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxslim.export.passes.bounds_behind_grids import bound_integers, quantize_before_bounds
from fxslim.export.passes.held_bounds import drop_held_bounds
from tests.export.passes.runtime import check, operators_in, outputs_of, parsed

X = np.concatenate([np.linspace(-9, 9, 4001), [0.0, -0.0, 6.0, np.inf, -np.inf]]).astype(np.float32)


def bounded(
    bound: str, scale: float, zero_point: int, dtype: str = "uint8", **constants: float
) -> tuple[str, str, str]:
    """Operators after dropping, after the quantizer moved before, and after the bound moved to the integers."""
    text = (
        f"g (float[N] x) => (float[N] y) {{ n = Neg(x) b = {bound} q = QuantizeLinear(b, s, z) "
        "y = DequantizeLinear(q, s, z) }"
    )
    held = {name: np.float32(number) for name, number in constants.items()}
    model = parsed(text, s=np.float32(scale), z=np.asarray(zero_point, dtype), **held)
    before = outputs_of(model, [X])[0]
    found = []
    for one in (drop_held_bounds, quantize_before_bounds, bound_integers):
        one(model)
        check(model)
        np.testing.assert_array_equal(before, outputs_of(model, [X])[0])
        found.append(" ".join(operators_in(model)))
    return found[0], found[1], found[2]


@pytest.mark.parametrize(
    ("bound", "scale", "zero_point", "dtype"),
    [
        ("Relu(n)", 0.1, 0, "uint8"),
        ("Relu(n)", 0.1, -128, "int8"),
        ("Clip(n, low, high)", 6 / 255, 0, "uint8"),
        ("Clip(n, low, high)", 5.9 / 255, 0, "uint8"),
        ("Clip(n, low)", 0.1, 0, "uint8"),
        ("Clip(n, , high)", 6 / 255, 10, "uint8"),
        ("Clip(n)", 1.0, 128, "uint8"),
    ],
)
def test_what_the_grid_holds_goes(bound: str, scale: float, zero_point: int, dtype: str) -> None:
    assert bounded(bound, scale, zero_point, dtype, low=0.0, high=6.0) == ("Neg Q DQ",) * 3


@pytest.mark.parametrize(
    ("bound", "scale", "zero_point", "dtype"),
    [
        ("Relu(n)", 0.1, 1, "uint8"),
        ("Relu(n)", 0.1, 0, "int8"),
        ("Clip(n, low, high)", 6.1 / 255, 0, "uint8"),
        ("Clip(n, low, high)", 5.9 / 255, 3, "uint8"),
        ("Clip(n, below, high)", 6.1 / 255, 200, "uint8"),
    ],
)
def test_what_it_does_not_hold_goes_behind_the_quantizer(bound: str, scale: float, zero_point: int, dtype: str) -> None:
    found = bounded(bound, scale, zero_point, dtype, low=0.0, high=6.0, below=-1.0)
    name = bound.split("(")[0]
    assert found == (f"Neg {name} Q DQ", f"Neg Q DQ {name} Q DQ", "Neg Q Clip DQ")


def test_16_bits_stay_in_float() -> None:
    assert bounded("Relu(n)", 0.1, 1, "uint16")[2] == "Neg Q DQ Relu Q DQ"


@given(st.floats(1e-3, 0.2), st.integers(0, 255), st.floats(-5, 5), st.floats(0, 9))
def test_any_grid_and_any_bounds_give_the_same_numbers(scale: float, zero_point: int, low: float, more: float) -> None:
    assert bounded("Clip(n, low, high)", scale, zero_point, low=low, high=low + more)[2].startswith("Neg Q")


def test_a_bound_that_another_reads_stays() -> None:
    model = parsed(
        "g (float[N] x) => (float[N] y, float[N] b) { n = Neg(x) b = Relu(n) q = QuantizeLinear(b, s, z) "
        "y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.1),
        z=np.uint8(0),
    )
    for one in (drop_held_bounds, quantize_before_bounds, bound_integers):
        assert not one(model)
