# SPDX-License-Identifier: Apache-2.0
"""Two grids in a row round twice, as ONNX Runtime optimizes the graph, too."""

import numpy as np
import pytest

from fxslim.export.passes import settle
from fxslim.export.passes.kept_as_written import keep_as_written
from tests.export.passes.runtime import check, operators_in, outputs_of, parsed

FIRST = {"s": np.float32(0.31), "z": np.uint8(100)}
SECOND = {"t": np.float32(0.23), "o": np.uint8(0)}
MOVES = ["", " m = Transpose<perm=[1,0]>(d)", " f = Flatten(d) m = Identity(f)"]


def chain(moves: str) -> str:
    last = "m" if moves else "d"
    return (
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        f"{moves} p = QuantizeLinear({last}, t, o) y = DequantizeLinear(p, t, o)"
    )


@pytest.mark.parametrize("moves", MOVES)
def test_two_grids_in_a_row_are_two(moves: str) -> None:
    model = parsed(f"g (float[40,50] x) => (float[] y) {{ {chain(moves)} }}", **FIRST, **SECOND)
    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32) * 10
    before = outputs_of(model, [x])[0]
    joined = outputs_of(model, [x], fused=True)[0]
    assert keep_as_written(model)
    check(model)
    np.testing.assert_array_equal(outputs_of(model, [x])[0], before)
    np.testing.assert_array_equal(outputs_of(model, [x], fused=True)[0], before)
    assert not keep_as_written(model)
    # Without the copy the runtime rounds once.
    assert moves or (joined != before).mean() > 0.05


def test_one_grid_twice_is_one() -> None:
    model = parsed(f"g (float[4,5] x) => (float[] y) {{ {chain('')} }}", **FIRST, t=FIRST["s"], o=FIRST["z"])
    assert operators_in(settle(model)) == ["Q", "DQ"]
