# SPDX-License-Identifier: Apache-2.0
"""Pairs at both sides of what moves values; where they must stay away; the same bits."""

import numpy as np
import pytest

from fxslim.export.passes.merged_pairs import merge_pairs
from fxslim.export.passes.moved_pairs import move_pairs
from tests.export.passes.runtime import check, operators_in, outputs_of, parsed

GRIDS = {
    "s": np.float32(0.02), "z": np.uint8(30), "s2": np.float32(0.05), "z2": np.uint8(128),
    "two": np.asarray([0, 8, 3, -1], np.int64), "perm": np.asarray([0, 2, 1, 3], np.int64), "zero": np.float32(0),
    "around": np.asarray([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "one": np.float32(1),
    "axes": np.asarray([2, 3], np.int64),
    "scales": np.asarray([1, 1, 2, 2], np.float32), "index": np.asarray([1, 0, 1], np.int64),
    "from_": np.asarray([1], np.int64), "to": np.asarray([3], np.int64), "axis": np.asarray([2], np.int64),
    "wide": np.asarray([3, 2, 4, 6, 6], np.int64), "squeezed": np.asarray([0], np.int64),
}  # fmt: skip
BEHIND = "r = LeakyRelu(x) {move} q = QuantizeLinear(m, s, z) d = DequantizeLinear(q, s, z) y = LeakyRelu(d)"
BEFORE = "q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, s, z) {move} y = LeakyRelu(m)"
MOVES = [
    "MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)", "MaxPool<kernel_shape=[2,2], dilations=[2,2]>(r)",
    "Reshape(r, two)", "Flatten<axis=2>(r)", "Transpose<perm=[0,2,3,1]>(r)", "Unsqueeze(r, squeezed)", "Identity(r)",
    "Slice(r, from_, to, axis)", "Gather<axis=1>(r, index)", "Expand(r, wide)", "Resize<mode=\"nearest\">(r, , scales)",
    "DepthToSpace<blocksize=2>(r)", "SpaceToDepth<blocksize=2>(r)", "Pad(r, around)", "Pad(r, around, zero)",
    "Pad<mode=\"reflect\">(r, around)", "ReduceMax<keepdims=0>(r, axes)", "GlobalMaxPool(r)", "Concat<axis=1>(r, r)",
]  # fmt: skip
COMPUTES = [
    "AveragePool<kernel_shape=[2,2]>(r)", "Resize<mode=\"linear\">(r, , scales)", "Pad(r, around, one)", "Neg(r)",
    "MaxPool<kernel_shape=[2,2], dilations=[2,2], pads=[1,1,1,1]>(r)", "Add(r, r)", "ReduceMean(r, axes)",
    "MaxPool<kernel_shape=[2,2], auto_pad=\"SAME_UPPER\">(r)",
]  # fmt: skip


X = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32) * 3


def moved(text: str) -> str:
    """Operators after the pass, whose results are those of before to the last bit."""
    model = parsed(f"g (float[2, 4, 6, 6] x) => (float[] y) {{ {text} }}", **GRIDS)
    before = outputs_of(model, [X])
    while move_pairs(model) | merge_pairs(model):
        check(model)
    np.testing.assert_array_equal(before[0], outputs_of(model, [X])[0])
    return " ".join(operators_in(model))


def name_of(move: str) -> str:
    return move.split("(")[0].split("<")[0]


@pytest.mark.parametrize("move", MOVES)
def test_a_pair_behind_a_move_is_also_put_before_it(move: str) -> None:
    found = moved(BEHIND.format(move=f"m = {move}"))
    assert found == f"LeakyRelu Q DQ {name_of(move)} Q DQ LeakyRelu"


@pytest.mark.parametrize("move", MOVES)
def test_a_pair_before_a_move_is_also_put_behind_it(move: str) -> None:
    assert moved(BEFORE.format(move=f"m = {move}")) == f"Q DQ {name_of(move)} Q DQ LeakyRelu"


@pytest.mark.parametrize("computing", COMPUTES)
def test_what_computes_is_left_alone(computing: str) -> None:
    name = name_of(computing)
    assert moved(BEHIND.format(move=f"m = {computing}")) == f"LeakyRelu {name} Q DQ LeakyRelu"
    assert moved(BEFORE.format(move=f"m = {computing}")) == f"Q DQ {name} LeakyRelu"


def test_over_several_moves_and_to_all_parts_of_a_join() -> None:
    found = moved(
        "a = LeakyRelu(x) b = Neg(x) j = Concat<axis=1>(a, b) p = MaxPool<kernel_shape=[2,2]>(j) f = Flatten(p) "
        "q = QuantizeLinear(f, s, z) y = DequantizeLinear(q, s, z)"
    )
    assert found == "LeakyRelu Q DQ Neg Q DQ Concat Q DQ MaxPool Q DQ Flatten Q DQ"


def test_a_join_of_two_grids_goes_on_with_that_of_the_whole() -> None:
    found = moved(
        "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) p = QuantizeLinear(x, s2, z2) "
        "b = DequantizeLinear(p, s2, z2) j = Concat<axis=1>(a, b) f = Flatten(j) r = QuantizeLinear(f, s, z) "
        "y = DequantizeLinear(r, s, z)"
    )
    assert found == "Q DQ Q DQ Concat Q DQ Flatten Q DQ"


def test_a_part_that_others_read_in_float_is_quantized_for_the_join_alone() -> None:
    found = moved(
        "a = LeakyRelu(x) b = Neg(x) j = Concat<axis=1>(a, b) q = QuantizeLinear(j, s, z) "
        "d = DequantizeLinear(q, s, z) e = Neg(a) y = Concat<axis=1>(d, e)"
    )
    assert found.startswith("LeakyRelu Q DQ Neg Q DQ Concat Q DQ Neg Concat")


@pytest.mark.parametrize(
    "other", ["o = Neg(m)", "o = Neg(r)", "p = QuantizeLinear(r, s2, z2) o = DequantizeLinear(p, s2, z2)"]
)
def test_what_is_read_in_another_way_stays(other: str) -> None:
    text = BEHIND.replace("y = LeakyRelu(d)", f"{other} y = Add(d, o)")
    found = moved(text.format(move="m = MaxPool<kernel_shape=[1,1]>(r)"))
    assert found.split()[:4] == ["LeakyRelu", "MaxPool", "Q", "DQ"]


def test_parts_of_a_split_on_two_grids_begin_with_grids_of_their_own() -> None:
    found = moved(
        "r = LeakyRelu(x) a, b = Split<axis=1, num_outputs=2>(r) m = MaxPool<kernel_shape=[2,2]>(a) "
        "q = QuantizeLinear(m, s, z) d = DequantizeLinear(q, s, z) n = MaxPool<kernel_shape=[2,2]>(b) "
        "p = QuantizeLinear(n, s2, z2) e = DequantizeLinear(p, s2, z2) y = Add(d, e)"
    )
    assert found == "LeakyRelu Split Q DQ Q DQ MaxPool Q DQ MaxPool Q DQ Add"


def test_a_result_of_the_graph_keeps_its_name_and_its_numbers() -> None:
    model = parsed(
        "g (float[2, 4, 6, 6] x) => (float[] y, float[] m) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
        "m = MaxPool<kernel_shape=[2,2]>(d) y = Neg(m) }",
        **GRIDS,
    )
    before = outputs_of(model, [X])
    move_pairs(model)
    assert [value.name for value in model.graph.outputs] == ["y", "m"]
    assert operators_in(model) == ["Q", "DQ", "MaxPool", "Q", "DQ", "Neg"]
    for one, other in zip(before, outputs_of(model, [X]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_are_no_activations() -> None:
    model = parsed(
        "g (float[2, 4, 6, 6] x) => (float[] y) { w = DequantizeLinear(k, s, zero8) t = Transpose<perm=[1,0]>(w) "
        "y = MatMul(x, t) }",
        **{**GRIDS, "k": np.ones((5, 6), np.int8), "zero8": np.int8(0)},
    )
    assert not move_pairs(model)
