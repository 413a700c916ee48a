# SPDX-License-Identifier: Apache-2.0
"""What all plans share."""

from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.checkpoint.plan_files import plan_from_dict
from fxslim.errors import CheckpointError, ConfigError
from fxslim.plan.plan import Plan


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def _plans() -> dict[str, tuple[nn.Module, Plan]]:
    """One of each kind, with a model that it fits."""
    nets = {kind: _net() for kind in ("pruning", "sparsity", "quantization", "convert", "bake")}
    fxslim.sparsify(nets["bake"], "2:4")
    fxslim.quantize(nets["convert"], "w8", data=[torch.randn(2, 8)])
    baked = fxslim.applied(fxslim.sparsity.bake(fxslim.sparsify(_net(), "2:4")))[-1]
    plans: dict[str, Any] = {
        "pruning": fxslim.plan_pruning(nets["pruning"], torch.randn(1, 8), ratio=0.5),
        "sparsity": fxslim.plan_sparsity(nets["sparsity"], "2:4"),
        "quantization": fxslim.plan_quantization(nets["quantization"]),
        "convert": fxslim.plan_convert(nets["convert"]),
        "bake": baked,
    }
    return {kind: (nets[kind], plan) for kind, plan in plans.items()}


@pytest.mark.parametrize("kind", ["pruning", "sparsity", "quantization", "convert", "bake"])
def test_a_plan_is_written_read_and_applied(kind: str) -> None:
    net, plan = _plans()[kind]
    written = plan.to_dict()
    assert (written["kind"], plan.kind) == (kind, kind)
    again = plan_from_dict(written)
    assert again.to_dict() == written
    assert fxslim.applied(again.apply(net))[-1].kind == kind


@pytest.mark.parametrize("kind", ["pruning", "sparsity", "quantization", "convert", "bake"])
def test_a_damaged_plan_is_refused(kind: str) -> None:
    _, plan = _plans()[kind]
    written = plan.to_dict()
    for broken in ({"shapes": 3}, {"shapes": {"0.weight": ["wide"]}}):
        with pytest.raises(CheckpointError, match="damaged"):
            plan_from_dict({**written, **broken})
    with pytest.raises(CheckpointError, match="version 99"):
        type(plan).from_dict({**written, "version": 99})


@pytest.mark.parametrize("kind", ["quantization", "convert", "bake"])
def test_data_that_nothing_would_look_at_are_refused(kind: str) -> None:
    net, plan = _plans()[kind]
    before = [type(module) for module in net.modules()]
    with pytest.raises(ConfigError, match="looks at no data"):
        plan.apply(net, data=[torch.randn(2, 8)])
    assert [type(module) for module in net.modules()] == before
