# SPDX-License-Identifier: Apache-2.0
"""What other tools' users write, in one or two lines here: the examples of docs/pruning.md."""

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import ConfigError, PlanError
from tests.pruning.test_allocation import Fork

X = torch.randn(1, 3, 16, 16)


def chain(*widths: int) -> nn.Sequential:
    """Convolutions with batch norms and activations between them, a head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).eval()


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_msmodelslim_reserves_a_share_of_the_parameters_in_sixteens() -> None:
    model = chain(64, 96, 128)
    first, last = model[0], model[-1]
    params = sum(p.numel() for p in model.parameters())
    # What set_node_reserved_ratio(0.5) and prune(0.8) of PruneTorch do with its importance, the mean of |w|.
    plan = fxslim.plan_pruning(
        model, X, at_most=0.8 * params, target="params", importance="conv_avg", max_ratio=0.5, round_to=16,
        skip=["0", "11"], strict=True,
    )  # fmt: skip
    desc = plan.to_desc()
    assert plan.params[1] <= 0.8 * params
    assert set(desc) <= {"3", "4", "6", "7", "11"}
    assert all(node["output"][0] % 16 == 0 for node in desc.values() if "output" in node)
    again = chain(64, 96, 128)
    fxslim.PruningPlan.from_desc(again, X, desc).apply(again)
    assert widths(plan.apply(model)) == widths(again)
    assert model[0] is first
    assert model[-1] is last
    assert widths(model)[0] == 64


def test_nni_config_list_later_entries_replace_earlier_ones() -> None:
    model = chain(20, 20, 20, 20)
    # [{"sparsity": 0.8, "op_types": ["default"]}, {"sparsity": 0.6, "op_names": ["3", "6"]},
    #  {"exclude": True, "op_names": ["9"]}]
    plan = fxslim.plan_pruning(
        model, X, ratio=0.0, overrides={nn.Conv2d: 0.8, nn.Linear: 0.8, "3": 0.6, "6": 0.6, "9": 0.0}
    )
    assert widths(plan.apply(model)) == [4, 8, 8, 20]
    assert model[-1].out_features == 5
    with pytest.raises(ConfigError, match="unknown key 'sparsity'"):
        fxslim.plan_pruning(model, X, ratio=0.0, overrides={"3": {"sparsity": 0.6}})


@pytest.mark.parametrize(
    "operator",
    ["bn", "conv_avg", "conv_all", "conv_max", "conv_threshold", "conv_similarity", "bn_similarity", "random"],
)
def test_the_eight_operators_remove_a_percentage_of_all_channels(operator: str) -> None:
    model = chain(16, 24, 32)
    # --prune_method=<operator> --percent=0.5
    plan = fxslim.plan_pruning(model, X, ratio=0.5, target="channels", importance=operator)
    assert sum(row.after for row in plan.rows) == 36
    assert plan.verify(model, X).ok


def test_dense_networks_have_the_ninth() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    plan = fxslim.plan_pruning(model, torch.randn(2, 12), ratio=0.5, target="channels", importance="dnn")
    assert sum(row.after for row in plan.rows) == 20


@pytest.mark.parametrize(
    ("channels", "ratio", "sixteens", "kept"),
    [(20, 0.25, 1, 15), (20, 0.25, 16, 16), (64, 0.3, 1, 45), (64, 0.3, 16, 48), (64, 0.5, 16, 32), (10, 0.25, 1, 8),
     (30, 0.1, 16, 30), (16, 0.9, 16, 16)],
)  # fmt: skip
def test_amct_keeps_as_many_as_its_ratio_and_alignment_say(
    channels: int, ratio: float, sixteens: int, kept: int
) -> None:
    model = chain(channels, 8)
    # filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: <ratio> ascend_optimized: <sixteens == 16> } }
    plan = fxslim.plan_pruning(
        model, X, ratio=0.0, importance="balanced_l2", overrides={"0": {"ratio": ratio, "round_to": sixteens}}
    )
    assert widths(plan.apply(model)) == [kept, 8]


def test_knight_mc_names_layers_whose_inputs_are_cut() -> None:
    model = chain(16, 24, 32)
    graph = fxslim.trace(model, X)
    # network: {net: [3, 6]}, pruning_pattern: channels, target_density: 0.5
    producers = [name for target in ("3", "6") for name in graph.parents(target)]
    plan = fxslim.plan_pruning(model, X, ratio=0.5, importance="l1", layers=producers, strict=True)
    assert {cut.name for cut in plan.cuts if cut.role == "producer"} == {"0.weight", "3.weight"}
    assert widths(plan.apply(model))[2] == 32

    fork = Fork()
    with pytest.raises(PlanError, match="that green reads are made by blue1 and blue2, and red reads them too"):
        fxslim.plan_pruning(fork, X, layers=fxslim.trace(fork, X).parents("green"), strict=True)


def test_knight_mc_cuts_the_inputs_that_its_figure_shows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(torch.relu(self.conv1(x)))

    model = Two()
    parents = fxslim.trace(model, X).parents("conv2")
    fxslim.prune(model, X, ratio=0.0, overrides=dict.fromkeys(parents, 0.25), strict=True)
    assert model.conv2.weight.shape == (2, 3, 3, 3)
    assert model.conv1.weight.shape == (3, 3, 3, 3)
