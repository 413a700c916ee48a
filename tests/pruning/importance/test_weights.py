# SPDX-License-Identifier: Apache-2.0
"""Criteria of weights equal plain loops, on every way in which channels are coupled."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import fxslim
from fxslim.pruning.importance import (
    CRITERIA,
    FPGM,
    L1,
    L2,
    BalancedL2,
    BatchNormWeight,
    ConvAll,
    ConvAvg,
    ConvMax,
    ConvThreshold,
    LInf,
    channel_scores,
)  # fmt: skip
from tests.graph.random_networks import randomise
from tests.pruning.importance.brute_force import aggregated, assert_same, distance, parts, scores_by_group
from tests.pruning.importance.small_networks import CASES, Case, Place

MAKERS = ("producer",)
each_case = pytest.mark.parametrize("name", CASES)


def made(name: str) -> Case:
    torch.manual_seed(sum(map(ord, name)))
    return CASES[name]()


def magnitudes(case: Case, place: Place, channel: int) -> list[float]:
    return [abs(w) for entry in parts(case, place, channel) for w in entry]


@each_case
def test_l1_and_l2(name: str) -> None:
    case = made(name)
    assert_same(scores_by_group(case, "l1"), aggregated(case, lambda p, c: sum(magnitudes(case, p, c))))
    squares = aggregated(case, lambda p, c: sum(w * w for w in magnitudes(case, p, c)))
    assert_same(scores_by_group(case, "l2"), {group: np.sqrt(values) for group, values in squares.items()})


@each_case
def test_linf(name: str) -> None:
    case = made(name)
    expected = aggregated(case, lambda p, c: max(magnitudes(case, p, c)), per_entry=False)
    assert_same(scores_by_group(case, "linf"), expected)


@each_case
@pytest.mark.parametrize("normalize", [None, "max", "minmax"])
def test_of_producers_and_normalized_otherwise(name: str, normalize: str | None) -> None:
    case = made(name)
    expected = aggregated(case, lambda p, c: sum(magnitudes(case, p, c)), roles=MAKERS, normalize=normalize)
    assert_same(scores_by_group(case, L1(over="producers", normalize=normalize)), expected)


@each_case
def test_norms_as_they_are(name: str) -> None:
    case = made(name)
    squares = aggregated(case, lambda p, c: sum(w * w for w in magnitudes(case, p, c)), normalize=None)
    expected = {group: np.sqrt(values) for group, values in squares.items()}
    assert_same(scores_by_group(case, L2(normalize=None)), expected)
    largest = aggregated(case, lambda p, c: max(magnitudes(case, p, c)), normalize=None)
    assert_same(scores_by_group(case, LInf(normalize=None)), largest)


@each_case
def test_figures_of_the_filter(name: str) -> None:
    case = made(name)

    def expected(value, **settings):
        return aggregated(case, lambda p, c: value(magnitudes(case, p, c)), roles=MAKERS, **settings)

    settings = {"normalize": None}
    assert_same(scores_by_group(case, "conv_avg"), expected(lambda w: sum(w) / len(w), **settings))
    assert_same(scores_by_group(case, "conv_all"), expected(sum, **settings))
    assert_same(scores_by_group(case, "conv_max"), expected(max, **settings))
    assert_same(scores_by_group(case, "conv_threshold"), expected(lambda w: sum(v > 0.06 for v in w)))
    large = ConvThreshold(threshold=0.2, normalize=None)
    assert_same(scores_by_group(case, large), expected(lambda w: sum(v > 0.2 for v in w), **settings))
    for criterion in (ConvAvg(normalize="max"), ConvAll(normalize="max"), ConvMax(normalize="max")):
        assert max(values.max() for values in scores_by_group(case, criterion).values()) == pytest.approx(1)


@each_case
def test_balanced_l2(name: str) -> None:
    case = made(name)

    def norm(place: Place, channel: int) -> float:
        return math.sqrt(sum(w * w for w in magnitudes(case, place, channel)))

    expected = aggregated(case, norm, roles=MAKERS, normalize="minmax", total=True)
    assert_same(scores_by_group(case, BalancedL2()), expected)
    assert_same(scores_by_group(case, "balanced_l2"), expected)


@each_case
def test_fpgm(name: str) -> None:
    case = made(name)

    def everything_of(place: Place) -> list:
        """The channels of all groups in this layer: where maps are concatenated there are several."""
        same = [q for places in case.groups.values() for q in places if (q.layer, q.role) == (place.layer, place.role)]
        return [parts(case, q, channel) for q in same for channel in range(len(q.entries))]

    def spread(place: Place, channel: int) -> float:
        own = parts(case, place, channel)
        return sum(distance(own, other) for other in everything_of(place))

    # Distances are rounded to float32.
    assert_same(scores_by_group(case, "fpgm"), aggregated(case, spread, per_entry=False), tolerance=1e-6)
    expected = aggregated(case, spread, roles=MAKERS, normalize=None)
    assert_same(scores_by_group(case, FPGM(over="producers", normalize=None)), expected, tolerance=1e-6)


X = torch.randn(2, 3, 6, 6)


def normed() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 7, 3), nn.BatchNorm2d(7))
    return randomise(model.append(nn.ReLU()).append(nn.Conv2d(7, 2, 1)))


def test_batch_norm_weights() -> None:
    model = normed()
    graph = fxslim.trace(model, X)
    weights = {"0": model[1].weight, "3": model[4].weight}
    for criterion, value in (("bn", abs), (BatchNormWeight(raw=True), float)):
        scores = channel_scores(graph, model, criterion, 0)
        for group in graph.groups:
            assert scores[group.channels].tolist() == [value(w) for w in weights[group.name].tolist()]


def test_dnn_is_the_mean_of_a_rows_magnitudes() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = fxslim.trace(model, torch.randn(2, 4))
    scores = channel_scores(graph, model, "dnn", 0)
    for group, layer in zip(graph.groups, (model[0], model[2]), strict=True):
        expected = [sum(map(abs, row)) / len(row) for row in layer.weight.tolist()]
        assert scores[group.channels].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random", "dnn"}))
def test_equal_channels_go_by_index(criterion: str) -> None:
    """All filters of a layer are equal, and made of numbers whose sums are not exact."""
    model = normed()
    with torch.no_grad():
        for layer in (model[0], model[3], model[6]):
            layer.weight.copy_(torch.randn(1, 1, *layer.kernel_size).expand_as(layer.weight))
            layer.bias.fill_(0.1)
        for norm in (model[1], model[4]):
            for state in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                state.fill_(0.7)
    data = [(X, torch.zeros(2, 4, 4, dtype=torch.long)[:, :2, :2])]
    plan = fxslim.plan_pruning(model, X, ratio=0.4, target="channels", importance=criterion, data=data)
    for cut in plan.cuts:
        if cut.name in ("0.weight", "3.weight") and cut.dim == 0:
            size = len(model.get_parameter(cut.name))
            assert cut.keep == tuple(range(size - len(cut.keep), size))


def test_random_is_by_seed() -> None:
    case = made("residual")
    first, same, other = (scores_by_group(case, "random", seed=seed) for seed in (3, 3, 4))
    assert all((first[name] == same[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    for a, b in itertools.pairwise(first.values()):
        assert set(a).isdisjoint(b)
