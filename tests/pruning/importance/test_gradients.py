# SPDX-License-Identifier: Apache-2.0
"""Criteria of gradients equal loops over samples; the model is as it was."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from fxslim import ConfigError
from fxslim.batches import as_data
from fxslim.pruning.importance import Fisher, Taylor, channel_scores
from fxslim.pruning.importance.samples import single_samples
from tests.pruning.importance.brute_force import aggregated, assert_same, parts, sample_products, scores_by_group
from tests.pruning.importance.small_networks import CASES, Place, plain
from tests.pruning.small_models import assert_unchanged, snapshot

FORMS = {
    "absolute": lambda products: abs(sum(products)),
    "squared": lambda products: sum(p * p for p in products),
    "gate": lambda products: sum(products) ** 2,
}


@pytest.mark.parametrize("normalize", ["mean", None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_taylor(name: str, form: str, normalize: str | None) -> None:
    case = CASES[name]()
    samples = sample_products(case)

    def value(place: Place, channel: int) -> float:
        products = ([p for entry in parts(case, place, channel, sample) for p in entry] for sample in samples)
        return sum(FORMS[form](found) for found in products) / len(samples)

    found = scores_by_group(case, Taylor(form=form, normalize=normalize), data=case.data)
    assert_same(found, aggregated(case, value, normalize=normalize), tolerance=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_half_of_squared_taylor(name: str) -> None:
    case = CASES[name]()
    samples = sample_products(case)

    def value(place: Place, channel: int) -> float:
        products = [p for sample in samples for entry in parts(case, place, channel, sample) for p in entry]
        return sum(p * p for p in products) / len(samples) / 2

    found = scores_by_group(case, Fisher(normalize=None, over="producers"), data=case.data)
    assert_same(found, aggregated(case, value, roles=("producer",), normalize=None), tolerance=1e-7)
    named = scores_by_group(case, "hessian", data=case.data)
    assert_same(scores_by_group(case, "fisher", data=case.data), named)
    assert_same(scores_by_group(case, Taylor(form="squared"), data=case.data), named)


def test_batches_as_samples() -> None:
    case = plain()
    one_each = [(x[None], y[None]) for x, y in zip(case.x, case.target, strict=True)]
    expected = scores_by_group(case, "taylor", data=case.data)
    assert_same(scores_by_group(case, Taylor(per="batch"), data=one_each), expected)
    other = scores_by_group(case, Taylor(per="batch"), data=case.data)
    assert max(abs(other[name] - expected[name]).max() for name in expected) > 1e-3


def test_frozen_weights_are_scored_and_nothing_changes() -> None:
    case = plain()
    expected = scores_by_group(case, "taylor", data=case.data)
    model = case.model.train()
    model[0].requires_grad_(False)
    model[3].weight.grad = torch.randn_like(model[3].weight)
    model[4].momentum = 0.5
    before, state = snapshot(model), torch.get_rng_state()
    with torch.no_grad():
        found = scores_by_group(case, "taylor", data=case.data)
    assert_same(found, expected)
    assert_unchanged(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_changes_after_an_error() -> None:
    case = plain()
    case.model[0].requires_grad_(False)
    before = snapshot(case.model)

    def loss(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        return outputs.sum() * torch.nan

    with pytest.raises(ConfigError, match="loss of a batch is nan"):
        fxslim.plan_pruning(case.model, case.x, importance="fisher", data=case.data, loss=loss)
    assert_unchanged(before, snapshot(case.model))


def test_half_precision_does_not_lose_small_products() -> None:
    case = plain()
    expected = scores_by_group(case, Taylor(form="squared", normalize=None), data=case.data)
    half = copy.deepcopy(case.model).to(torch.bfloat16)
    graph = fxslim.trace(half, case.x.bfloat16())
    data = as_data([(case.x.bfloat16(), case.target)])
    scores = channel_scores(graph, half, Taylor(form="squared", normalize=None), 0, data)
    for group in graph.groups:
        assert scores[group.channels] == pytest.approx(expected[group.name], rel=0.5, abs=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0].mean(1))


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "apoz", "mean_activation", "reconstruction", "fpgm"])
def test_recurrent_layers(criterion: str) -> None:
    x = torch.randn(4, 5, 4)
    data = [(x, torch.tensor([0, 1, 2, 0]))]
    plan = fxslim.plan_pruning(Recurrent(), x, ratio=0.3, importance=criterion, data=data)
    assert plan.cuts
    assert plan.verify(Recurrent(), x).ok


def test_samples_of_batches() -> None:
    x, y = torch.arange(6).view(2, 3), torch.tensor([7, 8])
    assert [(a.tolist(), b.tolist()) for a, b in single_samples((x, y))] == [([[0, 1, 2]], [7]), ([[3, 4, 5]], [8])]
    (first, _) = single_samples({"input_ids": x, "labels": y, "scale": torch.tensor(2.0), "name": "a"})
    assert (first["input_ids"].tolist(), first["scale"].item(), first["name"]) == ([[0, 1, 2]], 2.0, "a")
