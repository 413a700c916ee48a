# SPDX-License-Identifier: Apache-2.0
"""Runs that the library makes to look at a model are no batches: masks and counters are then as before."""

import pytest
import torch
from torch import nn

import fxslim


@pytest.mark.parametrize("training", [True, False])
def test_tracing_and_planning_count_nothing(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(2, 4, 4, 4)
    fxslim.sparsify(model, "2:4", layers=["0", "4"], update_freq=1, regrow=0.5, example_inputs=x).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxslim.trace(model, x)
    plan = fxslim.plan_sparsity(model, "2:4", method="wanda", data=[x], example_inputs=x, ineligible="ignore")
    assert [one.name for one in plan.weights] == ["2.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training == training
