# SPDX-License-Identifier: Apache-2.0
"""Whatever the graph: the same numbers, a valid file, and no pair that does nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxslim.export.passes import settle
from fxslim.export.passes.grids import grid_of_value, is_operator, quantizing
from fxslim.export.passes.moved_pairs import wanted_grids
from fxslim.export.passes.moving import moved_inputs
from tests.export.passes.random_graphs import RandomGraph
from tests.export.passes.runtime import check, operators_in, outputs_of

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 40)


def same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@given(SEEDS, SIZES)
def test_settling_changes_no_bit(seed: int, size: int) -> None:
    graph = RandomGraph(seed, size, exact=True)
    names = [value.name for value in graph.model.graph.outputs]
    before = outputs_of(graph.model, [graph.x])
    settle(graph.model)
    check(graph.model)
    assert [value.name for value in graph.model.graph.outputs] == names
    same(before, outputs_of(graph.model, [graph.x]))


@given(SEEDS, SIZES)
def test_settling_twice_is_settling_once(seed: int, size: int) -> None:
    graph = RandomGraph(seed, size, exact=False)
    settle(graph.model)
    once = operators_in(graph.model)
    settle(graph.model)
    assert operators_in(graph.model) == once


@given(SEEDS, SIZES)
def test_each_move_of_a_grid_has_pairs_on_both_sides_and_no_pair_is_idle(seed: int, size: int) -> None:
    model = settle(RandomGraph(seed, size, exact=True).model)
    wanted = wanted_grids(model)
    for node in model.graph:
        results = {wanted.get(result) for result in node.outputs if result.uses() or result.is_graph_output()}
        if len(results) == 1 and None not in results:
            for place in moved_inputs(node):
                value = node.inputs[place]
                read_otherwise = value not in wanted and not is_operator(node, "Concat")
                assert grid_of_value(value) is not None or read_otherwise
        if is_operator(node, "QuantizeLinear"):
            assert grid_of_value(node.inputs[0]) != quantizing(node)
            assert node.outputs[0].uses()
