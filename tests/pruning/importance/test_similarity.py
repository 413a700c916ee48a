# SPDX-License-Identifier: Apache-2.0
"""Similar channels go one after the other; each step looks again at what is left."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxslim
from fxslim.pruning.importance import channel_scores
from fxslim.pruning.importance.distances import squared_distances
from fxslim.pruning.importance.similarity import removal_order
from tests.pruning.importance.brute_force import aggregated, assert_same, distance, parts, scores_by_group
from tests.pruning.importance.small_networks import CASES, Place


def order_by_hand(vectors: list[list[float]]) -> list[int]:
    """When each goes: at every step all distances between what is left are made anew."""
    left, order = list(range(len(vectors))), [len(vectors) - 1] * len(vectors)
    for number in range(len(vectors) - 1):
        nearest = {
            i: min(sum((a - b) ** 2 for a, b in zip(vectors[i], vectors[j], strict=True)) for j in left if j != i)
            for i in left
        }
        gone = min(left, key=lambda i: (nearest[i], i))
        order[gone] = number
        left.remove(gone)
    return order


@pytest.mark.parametrize("name", CASES)
def test_conv_similarity(name: str) -> None:
    case = CASES[name]()
    orders: dict[str, list[int]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for places in case.groups.values():
        for place in places:
            if place.role == "producer":
                channels = range(len(place.entries))
                vectors = [[abs(w) for entry in parts(case, place, c) for w in entry] for c in channels]
                orders[place.layer] = order_by_hand(vectors)
    sizes = {layer: len(order) for layer, order in orders.items()}

    def share(place: Place, channel: int) -> float:
        return (orders[place.layer][channel] + 1) / sizes[place.layer] if place.role == "producer" else 1.0

    expected = aggregated(case, share, roles=("producer",), normalize=None)
    assert_same(scores_by_group(case, "conv_similarity"), expected)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=2, max_size=9))
def test_orders_equal_those_by_hand(rows: list[list[int]]) -> None:
    found = removal_order(squared_distances(torch.tensor(rows).double()), np.zeros(len(rows), dtype=bool))
    assert found.tolist() == order_by_hand([[float(v) for v in row] for row in rows])


def test_what_is_fixed_stays_and_still_counts() -> None:
    distances = np.array([[0.0, 1.0, 8.0], [1.0, 0.0, 5.0], [8.0, 5.0, 0.0]])
    assert removal_order(distances, np.array([True, False, False])).tolist() == [2, 0, 1]
    assert removal_order(distances, np.array([True, True, True])).tolist() == [2, 2, 2]


def test_only_one_of_two_equal_filters_goes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        # One differs by its signs, which magnitudes do not see.
        model[0].weight[6] = model[0].weight[1]
        model[0].weight[4] = -model[0].weight[3]
    plan = fxslim.plan_pruning(
        model, torch.randn(1, 3, 8, 8), ratio=0.25, target="channels", importance="conv_similarity"
    )
    assert {cut.keep for cut in plan.cuts} == {(0, 2, 4, 5, 6, 7)}


def test_bn_similarity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -1.0, 1.3, 0.2, 1.1]))
    graph = fxslim.trace(model, torch.randn(1, 3, 8, 8))
    scores = channel_scores(graph, model, "bn_similarity", 0)[graph.groups[0].channels]
    expected = order_by_hand([[w] for w in model[1].weight.tolist()])
    assert (scores * 5 - 1).round(9).tolist() == expected
    assert expected[0] == 0


@pytest.mark.parametrize("length", [2, 40])
def test_distances(length: int) -> None:
    vectors = torch.randn(7, length)
    vectors[5] = vectors[2]
    found = squared_distances(vectors)
    rows = vectors.double().tolist()
    expected = [[distance([a], [b]) ** 2 for b in rows] for a in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[2, 5] == 0
    assert (np.diag(found) == 0).all()
    assert (found == found.T).all()
