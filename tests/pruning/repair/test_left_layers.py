# SPDX-License-Identifier: Apache-2.0
"""Layers that least squares can't refit keep their values, and are told in the plan's notes or a warning."""

import logging
import re

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.pruning.repair.settings import INPUTS
from tests.pruning.repair.oracles import IMAGES, deep, error, least_squares, pruned


def test_layers_that_can_not_be_refitted_are_told_and_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1))
    plan = fxslim.plan_pruning(model, IMAGES[0].float(), repair=least_squares(), data=[x.float() for x in IMAGES])
    assert any("2: least squares knows" in note and "ConvTranspose2d" in note for note in plan.notes), plan.notes
    before = dict(model.named_parameters())["2.weight"].detach().clone()
    keep = {(cut.name, cut.dim): list(cut.keep) for cut in plan.cuts}
    after = plan.apply(model)[2].weight
    kept = before[keep["2.weight", 0]][:, keep.get(("2.weight", 1), range(6))]
    torch.testing.assert_close(after.detach(), kept, rtol=0, atol=0)


class Computed(nn.Linear):
    """Its forward is not that of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_layer_that_computes_something_else_is_left_and_logged(inputs: str, caplog) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), Computed(16, 3))
    batches = [torch.randn(100, 4)]
    with caplog.at_level(logging.WARNING, "fxslim"):
        repaired = pruned(model, batches[0], least_squares(inputs), batches)
    assert "2: what it returns is not its weight times its input" in caplog.text
    plain = pruned(model, batches[0], None, None)
    torch.testing.assert_close(repaired[2].weight, plain[2].weight, rtol=0, atol=0)


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.a(x) + self.b(x).relu()


def test_shared_weights_are_left_and_told() -> None:
    batches = [torch.randn(100, 4)]
    plan = fxslim.plan_pruning(Shared(), batches[0], repair=least_squares(), data=batches)
    assert any("a: its weight or bias is shared" in note for note in plan.notes), plan.notes


class HandingOver(nn.Module):
    """Hands the weight of a layer to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).relu(), self.second.weight, self.second.bias)


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_weight_that_is_handed_to_a_function_is_left_and_logged(inputs: str, caplog) -> None:
    batches = [torch.randn(100, 4)]
    with caplog.at_level(logging.WARNING, "fxslim"):
        repaired = pruned(model := HandingOver(), batches[0], least_squares(inputs), batches)
    assert "second: no batch of data calls it as a layer" in caplog.text
    torch.testing.assert_close(repaired.second.weight, pruned(model, batches[0], None, None).second.weight)


@pytest.mark.parametrize("inputs", INPUTS)
def test_little_data_fits_by_channel_and_very_little_not_at_all(inputs: str, caplog) -> None:
    model = deep()
    plain = pruned(model, IMAGES[0], None, None)
    with caplog.at_level(logging.WARNING, "fxslim"):
        few = pruned(model, IMAGES[0], least_squares(inputs), [x[:10] for x in IMAGES])
        assert "8: fitted by channel: 40 sampled rows are few for 36 inputs; give more data" in caplog.text
        least = pruned(model, IMAGES[0], least_squares(inputs, num_positions=7), [IMAGES[0][:1]])
    assert re.search(r"5: left: 7 sampled rows are too few for \d inputs", caplog.text)
    assert error(few, model, IMAGES) < error(plain, model, IMAGES)
    for a, b in zip(least.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
