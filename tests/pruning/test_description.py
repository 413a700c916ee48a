# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's desc: what a plan writes, what it reads back, what it refuses."""

import json

import pytest
import torch
from torch import nn

import fxslim
from fxslim import PlanError, PruningPlan
from tests.graph.random_networks import RandomNetwork
from tests.pruning.small_models import X, small
from tests.pruning.test_masks_to_plan import Residual

TEXT = "-x--xx----------"
INPUT = torch.randn(2, 3, 10, 10)


def test_a_desc_names_changed_layers_by_their_sides() -> None:
    desc = {"0": {"output": [13, TEXT]}}
    plan = PruningPlan.from_desc(small(), X, desc)
    assert plan.to_desc() == {**desc, "1": {"input": [13, TEXT]}, "3": {"input": [13, TEXT]}}
    assert {cut.keep for cut in plan.cuts} == {tuple(i for i, c in enumerate(TEXT) if c == "-")}
    model = plan.apply(small())
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (13, 13, 13)
    # The norm or the reader alone say the same.
    for layer in ("1", "3"):
        assert PruningPlan.from_desc(small(), X, {layer: {"input": [13, TEXT]}}).to_dict() == plan.to_dict()


def can_tell(plan: PruningPlan) -> bool:
    """Whether each layer has one weight, and groups of one weight drop the same channels."""
    weights: dict[str, str] = {}
    for cut in plan.cuts:
        if cut.role == "follower" or cut.name not in plan.shapes:
            continue
        if weights.setdefault(cut.name.rpartition(".")[0], cut.name) != cut.name:
            return False
        width = plan.shapes[cut.name][cut.dim]
        blocks = [sorted(k - b * width for k in cut.keep if k // width == b) for b in range(cut.blocks)]
        if any(block != blocks[0] for block in blocks):
            return False
    return True


def test_random_plans_come_back_whole() -> None:
    told = untold = 0
    for seed in range(120):
        model, x = RandomNetwork(seed), torch.randn(2, 3, 8, 8)
        try:
            plan = fxslim.plan_pruning(model, x, ratio=0.35, importance="random", seed=seed)
        except PlanError:
            continue
        if not can_tell(plan):
            with pytest.raises(PlanError, match="a desc can't say"):
                plan.to_desc()
            untold += 1
            continue
        desc = plan.to_desc()
        again = PruningPlan.from_desc(model, x, json.loads(json.dumps(desc)))
        assert again.cuts == plan.cuts, seed
        assert again.new_sizes == plan.new_sizes, seed
        told += 1
    assert told >= 60
    assert untold >= 5


def test_grouped_inputs_are_told_per_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, groups=2))
    plan = PruningPlan.from_desc(model, INPUT, {"1": {"input": [3, "-x--"]}})
    assert plan.to_desc() == {"0": {"output": [6, "-x---x--"]}, "1": {"input": [3, "-x--"]}}
    assert plan.verify(model, INPUT).ok
    uneven = PruningPlan.from_desc(model, INPUT, {"0": {"output": [6, "x----x--"]}})
    with pytest.raises(PlanError, match=r"1\.weight: its 2 groups drop different input channels"):
        uneven.to_desc()


def test_layers_with_several_weights_are_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(4, 6))
            self.third = nn.Parameter(torch.rand(2, 4))

        def forward(self, x):
            return torch.sigmoid(torch.sigmoid(x @ self.first.t()) @ self.second.t()) @ self.third.t()

    plan = fxslim.plan_pruning(Both(), torch.rand(3, 4), ratio=0.4)
    with pytest.raises(PlanError, match="the model holds several weights that lose channels"):
        plan.to_desc()


@pytest.mark.parametrize(
    "desc, message",
    [
        ([], "desc is a list, expected a dict"),
        ({"conv": {}}, r"does not belong to this model: unknown layer 'conv'"),
        ({"0": {"outputs": [8, "-" * 8]}}, r"desc\['0'\]: unknown side 'outputs'; did you mean 'output'"),
        ({"0": {"output": "--x"}}, r"desc\['0'\]\['output'\] is '--x', expected \[number kept, text"),
        ({"0": [13]}, r"desc\['0'\] is \[13\], expected a dict with 'input' or 'output'"),
        ({"0": {"output": [12, TEXT]}}, r"says that 12 are kept, its text '-x--xx-+' keeps 13"),
        ({"0": {"output": [2, "-o-"]}}, r"says that 2 are kept, its text '-o-' keeps 2"),
        ({"0": {"output": [1, "-x"]}}, r"has 2 channels, the model 16: it does not belong"),
        ({"0": {"output": [0, "x" * 16]}}, r"keeps no channel of 0\.weight; at least one must stay"),
        ({"8": {"output": [4, "----x"]}}, r"\['8'\]\['output'\] drops channel 4, which must stay: model output in 8"),
        ({"0": {"output": [13, TEXT]}, "3": {"input": [16, "-" * 16]}},
         r"desc\['3'\]\['input'\] keeps channel 1, which a layer that shares it drops"),
    ],
)  # fmt: skip
def test_bad_descs(desc: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_desc(small(), X, desc)


def test_what_is_coupled_goes_together() -> None:
    plan = PruningPlan.from_desc(Residual(), INPUT, {"a": {"output": [7, "-------x"]}})
    assert plan.to_desc()["b"] == {"output": [7, "-------x"]}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, groups=2))
    with pytest.raises(PlanError, match=r"desc leaves \[3, 4\] channels in parts of 0\.weight, .*equally large"):
        PruningPlan.from_desc(model, INPUT, {"0": {"output": [7, "-x------"]}})
