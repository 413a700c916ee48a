# SPDX-License-Identifier: Apache-2.0
"""One Q of each grid behind a value, no pair behind its own grid, nothing that nobody reads."""

import numpy as np
import pytest

from fxslim.export.passes.grids import Grid
from fxslim.export.passes.merged_pairs import merge_pairs
from tests.export.passes.runtime import check, operators_in, outputs_of, parsed

GRIDS = {"s": np.float32(0.02), "z": np.uint8(30), "same_s": np.float32(0.02), "s2": np.float32(0.03)}
X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) * 3


def merged(text: str) -> str:
    model = parsed(f"g (float[2, 4] x) => (float[2, 4] y) {{ {text} }}", **GRIDS)
    before = outputs_of(model, [X])
    merge_pairs(model)
    check(model)
    np.testing.assert_array_equal(before[0], outputs_of(model, [X])[0])
    return " ".join(operators_in(model))


def test_pairs_in_a_row() -> None:
    first = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
    assert merged(first + "p = QuantizeLinear(d, same_s, z) y = DequantizeLinear(p, same_s, z)") == "Q DQ"
    assert merged(first + "p = QuantizeLinear(d, s2, z) y = DequantizeLinear(p, s2, z)") == "Q DQ Q DQ"


def test_twins_become_the_first() -> None:
    text = "q = QuantizeLinear(x, s, z) p = QuantizeLinear(x, same_s, z) d = DequantizeLinear(q, s, z) "
    assert merged(text + "e = DequantizeLinear(p, s, z) y = Add(d, e)") == "Q DQ Add"
    text = "p = QuantizeLinear(x, s2, z) e = DequantizeLinear(p, s2, z) q = QuantizeLinear(x, s, z) "
    assert merged(text + "d = DequantizeLinear(q, s, z) y = Add(d, e)") == "Q DQ Q DQ Add"


def test_what_nobody_reads_vanishes_and_computed_values_do_not() -> None:
    unread = "y = Neg(x) q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) f = Flatten(d) n = Neg(x)"
    assert merged(unread) == "Neg Neg"


@pytest.mark.parametrize("zero_point", [0, 1, 77, 255])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 3e-5, 1 / 255, 0.1, 1.0, 3.1415927, 1e30])
def test_an_integer_comes_back(scale: float, zero_point: int) -> None:
    """What the pass rests on, for all integers of a type; of 16 bits too."""
    for dtype in ("uint8", "uint16"):
        grid = Grid(float(np.float32(scale)), zero_point, dtype)
        for integer in range(0, grid.bounds[1] + 1, 1 if dtype == "uint8" else 97):
            number = np.float32(integer - zero_point) * np.float32(scale)
            assert grid.quantized(float(number)) == integer
