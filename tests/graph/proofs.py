# SPDX-License-Identifier: Apache-2.0
"""What every family of layers must pass: pruned at random, proved, applied, counted, trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.graph.inputs import as_inputs, output_tensors
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise


def check_family(model: nn.Module, inputs: Any, *, prunes: str = "", ratio: float = 0.4, seed: int = 0) -> nn.Module:
    """Prune random channels of the model, prove it, apply; the planned cost is the real one and it still trains.

    ``prunes`` names layers that must lose channels of their own.
    """
    randomise(model, seed)
    graph = fxslim.trace(model, inputs)
    for layer in prunes.split():
        assert any(layer in g.layers("producer", "depthwise") for g in graph.groups), graph.explain(layer)
    for attempt in range(10):
        plan = fxslim.plan_pruning(
            model, inputs, ratio=ratio, target="channels", importance="random", seed=seed + attempt
        )
        cut = {cut.name.rpartition(".")[0] for cut in plan.cuts}
        if set(prunes.split()) <= cut:
            break
    else:
        raise AssertionError(f"not all of {prunes} are cut:\n{plan}")
    # Twice: the proof of a second example must not depend on the first.
    proof = plan.verify(model, as_inputs(inputs) * 2)
    assert proof.ok, f"{proof}\n{plan}\n{graph}"
    assert proof.relative <= TOLERANCE
    assert plan.macs[0] == graph.cost.macs > 0
    plan.apply(model)
    assert sum(p.numel() for p in model.parameters()) == plan.params[1]
    assert fxslim.trace(model, inputs).cost.macs == pytest.approx(plan.macs[1], abs=len(graph.cost.calls))
    model.train()
    sum(out.sum() for out in output_tensors(as_inputs(inputs)[0].run(model)) if out.requires_grad).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    return model


def stays(model: nn.Module, inputs: Any, layer: str, match: str) -> None:
    """A layer keeps its channels for a reason that says so; what else is pruned is right."""
    randomise(model)
    graph = fxslim.trace(model, inputs)
    assert not any(layer in g.layers("producer", "depthwise") for g in graph.groups), graph
    assert match in graph.explain(layer), graph.explain(layer)
    assert layer in graph.frozen_layers()
    assert match in graph.report()
    if graph.groups:
        plan = fxslim.plan_pruning(model, inputs, ratio=0.3, target="channels", importance="random")
        assert plan.verify(model, inputs).relative <= TOLERANCE
        plan.apply(model)


class Rows(nn.Module):
    """A feature map (N, C, ...) as a sequence (N, positions, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class First(nn.Module):
    """The first result of a layer that has several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Tensor:
        return self.layer(*args)[0]


def picture(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)
