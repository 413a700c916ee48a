# SPDX-License-Identifier: Apache-2.0
"""Criteria of activations equal loops over what layers read, however the weights come into the product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxslim
from fxslim.batches import as_data
from fxslim.pruning.importance import APoZ, MeanActivation, Reconstruction, channel_scores
from tests.graph.random_networks import randomise
from tests.graph.test_attention import Transformer
from tests.pruning.importance.brute_force import aggregated, assert_same, inputs_read, parts, read_by, scores_by_group
from tests.pruning.importance.small_networks import CASES, Place
from tests.pruning.small_models import assert_unchanged, snapshot

READERS = ("consumer", "depthwise")


@pytest.mark.parametrize("name", CASES)
def test_shares_of_zeros_and_means(name: str) -> None:
    case = CASES[name]()
    inputs = inputs_read(case)

    def values(place: Place, channel: int) -> list[float]:
        # A producer's own input is not its channel's; it does not count here.
        return [v for e in read_by(inputs, place, channel) for v in e] if place.role in READERS else [1.0]

    def not_zero(place: Place, channel: int) -> float:
        return 1 - sum(v == 0 for v in values(place, channel)) / len(values(place, channel))

    def mean(place: Place, channel: int) -> float:
        return sum(map(abs, values(place, channel))) / len(values(place, channel))

    expected = aggregated(case, not_zero, roles=READERS, normalize=None)
    assert_same(scores_by_group(case, "apoz", data=case.data), expected)
    found = scores_by_group(case, "mean_activation", data=case.data)
    assert_same(found, aggregated(case, mean, roles=READERS, per_entry=False))
    raw = scores_by_group(case, MeanActivation(normalize=None), data=case.data)
    assert_same(raw, aggregated(case, mean, roles=READERS, normalize=None))


@pytest.mark.parametrize("normalize", ["mean", None])
@pytest.mark.parametrize("name", CASES)
def test_reconstruction(name: str, normalize: str | None) -> None:
    case = CASES[name]()
    inputs = inputs_read(case)

    def change(place: Place, channel: int) -> float:
        if place.role != "consumer":
            return 1.0
        read, weights = read_by(inputs, place, channel), parts(case, place, channel)
        pairs = zip(read, weights, strict=True)
        return sum(sum(x * x for x in xs) / len(xs) * sum(w * w for w in ws) for xs, ws in pairs)

    expected = aggregated(case, change, roles=("consumer",), normalize=normalize)
    assert_same(scores_by_group(case, Reconstruction(normalize=normalize), data=case.data), expected)


class ManyWays(nn.Module):
    """The same linear layer, its weight brought into the product in another way each time."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3, bias="bias" in way)

    def forward(self, x: Tensor) -> Tensor:
        y, weight = F.relu(self.up(x)), self.down.weight
        if self.way == "function":
            return F.linear(y, weight)
        if self.way == "product":
            return y @ weight.t()
        if self.way == "einsum":
            return torch.einsum("bi,oi->bo", y, weight)
        if self.way == "left":
            return torch.einsum("oi,bi->bo", weight, y)
        return self.down(y)


@pytest.mark.parametrize("way", ["module", "bias", "function", "product", "einsum", "left"])
def test_ways_of_using_a_weight(way: str) -> None:
    torch.manual_seed(0)
    model, x = ManyWays(way), torch.randn(5, 4)
    graph = fxslim.trace(model, x)
    channels = graph.groups[0].channels
    read = F.relu(model.up(x)).detach()
    for criterion, expected in (
        (MeanActivation(normalize=None), read.abs().mean(0)),
        (APoZ(), (read != 0).double().mean(0)),
        (Reconstruction(normalize=None), read.square().mean(0) * model.down.weight.detach().square().sum(0)),
    ):
        scores = channel_scores(graph, model, criterion, 0, as_data([x[:2], x[2:]]))
        # The mean over all samples, not over batches.
        assert scores[channels] == pytest.approx(expected.double().numpy(), rel=1e-5)


@pytest.mark.parametrize("way", ["fused", "chunk", "grouped", "sdpa", "module"])
@pytest.mark.parametrize("heads", ["whole", "dim"])
def test_channels_that_no_weight_reads(way: str, heads: str) -> None:
    """Entries of queries and keys are multiplied with one another: there it counts what their layer makes."""
    model, x = randomise(Transformer(way)), torch.randn(3, 10, 8)
    graph = fxslim.trace(model, x, heads=heads)
    scores = channel_scores(graph, model, "mean_activation", 0, as_data([x]))
    for group in graph.groups:
        assert (scores[group.channels] > 0).all()
    plan = fxslim.plan_pruning(model, x, ratio=0.3, importance="apoz", data=[x], heads=heads)
    assert plan.verify(model, x).ok


def test_nothing_changes() -> None:
    case = CASES["plain"]()
    case.model.train()
    before = snapshot(case.model)
    scores_by_group(case, "reconstruction", data=case.data)
    assert_unchanged(before, snapshot(case.model))
