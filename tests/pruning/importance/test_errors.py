# SPDX-License-Identifier: Apache-2.0
"""What a criterion can't work with is an error that names the group, the layer, the numbers and a way out."""

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import ConfigError
from fxslim.pruning.importance import (
    L2,
    APoZ,
    BatchNormWeight,
    ConvThreshold,
    Fisher,
    Importance,
    MeanActivation,
    Reconstruction,
    Taylor,
)
from tests.graph.test_attention import Transformer
from tests.pruning.small_models import X, small

DATA = [(X, torch.tensor([0, 1]))]
READ_DATA = ["taylor", "fisher", "hessian", "apoz", "mean_activation", "reconstruction"]


def planned(importance: Any, model: nn.Module | None = None, **settings: Any) -> fxslim.PruningPlan:
    return fxslim.plan_pruning(model or small(), X, importance=importance, **{"ratio": 0.3, **settings})


@pytest.mark.parametrize("name", READ_DATA)
def test_data_is_missing_or_empty(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"importance='{name.replace('hessian', 'fisher')}' looks at .* needs data="):
        planned(name)
    with pytest.raises(ConfigError, match="data has no batches"):
        planned(name, data=[])


@pytest.mark.parametrize("name", [*READ_DATA, "l1", "linf", "bn", "fpgm", "conv_similarity", "balanced_l2", "dnn"])
def test_the_meta_device_has_no_values(name: str) -> None:
    with torch.device("meta"):
        model, x = small().append(nn.ReLU()).append(nn.Linear(5, 4)), torch.randn(2, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"\d\.weight is on the meta device: use importance='random'"):
        fxslim.plan_pruning(model, x, importance=name, data=[(x, torch.tensor([0, 1]))])


@pytest.mark.parametrize("name", sorted(set(fxslim.pruning.importance.CRITERIA) - {"random"}))
def test_weights_that_are_no_numbers(name: str) -> None:
    model = small()
    layer = model[4] if name.startswith("bn") else model[8] if name == "dnn" else model[3]
    with torch.no_grad():
        layer.weight.view(-1)[0] = torch.nan
    if name == "dnn":
        model = model.append(nn.ReLU()).append(nn.Linear(5, 4))
    settings = {"skip": [nn.Conv2d], "target": "channels", "ratio": 0.05} if name == "dnn" else {}
    with pytest.raises(ConfigError, match=r"NaN or infinit|loss of a batch is nan"):
        planned(name, model, data=DATA, **settings)


class Positions(Importance):
    name = "positions"

    def __init__(self, scores: Any) -> None:
        self.given = scores

    def scores(self, context: Any) -> Any:
        return self.given(len(context.graph.resolved.classes))


def test_a_criterion_of_ones_own_is_used_and_checked() -> None:
    plan = planned(Positions(np.arange), target="channels")
    assert plan.cuts[0].keep[-1] == 15
    with pytest.raises(ConfigError, match=r"importance Positions: scores of shape \(3,\), expected \(\d+,\)"):
        planned(Positions(lambda count: np.ones(3)))
    with pytest.raises(ConfigError, match="importance of group 0: 16 of 16 values are not finite"):
        planned(Positions(lambda count: np.full(count, np.nan)))


@pytest.mark.parametrize(
    "criterion, message",
    [
        ("tailor", "unknown importance 'tailor'; did you mean 'taylor'"),
        (Taylor, r"importance=Taylor is a class: give an instance, Taylor\(\)"),
        (3, "importance=3 must be a name, an Importance, or a function"),
    ],
)
def test_what_importance_takes(criterion: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(criterion)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Taylor(form="square"), "importance 'taylor': unknown form 'square'; did you mean 'squared'"),
        (lambda: Fisher(per="samples"), "importance 'fisher': unknown per 'samples'; did you mean 'sample'"),
        (lambda: L2(over="producer"), "importance 'l2': unknown over 'producer'; did you mean 'producers'"),
        (lambda: APoZ(normalize="maximum"), "importance 'apoz': unknown normalize 'maximum'"),
        (lambda: ConvThreshold(threshold=-1), "threshold=-1 must be a number of at least 0"),
        (lambda: ConvThreshold(threshold="0.1"), "threshold='0.1' must be a number"),
    ],
)
def test_arguments_of_criteria(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("name", ["bn", "bn_similarity", BatchNormWeight(raw=True)])
def test_nets_without_batch_norm(name: Any) -> None:
    model = small()
    model[4] = nn.Identity()
    with pytest.raises(ConfigError, match=r"group 3: 24 of its 24 channels pass no batch norm.*skip=\['3'\]"):
        planned(name, model)
    assert planned(name, model, skip=["3"], target="channels").rows[1].after == 24


def test_dnn_is_for_linear_layers() -> None:
    with pytest.raises(ConfigError, match=r"group 0: 16 of its 16 channels are made by no linear layer"):
        planned("dnn")


def test_losses_that_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match="the loss of a batch is nan"):
        planned("taylor", data=[(X * torch.nan, torch.tensor([0, 1]))])


class Aside(nn.Module):
    """A second output that the loss does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.other, self.end = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.first(x).relu()).mean((2, 3)), self.end(self.other(x).relu())


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_layers_that_the_loss_does_not_reach(name: str) -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs[0], batch[1])

    with pytest.raises(
        ConfigError, match=r"group other: 6 of its 6 channels are reached by no gradient.*skip=\['other'"
    ):
        planned(name, Aside(), data=DATA, loss=loss)
    assert planned(name, Aside(), data=DATA, loss=loss, skip="other").rows[1].after == 6


def test_losses_without_gradients() -> None:
    @torch.no_grad()
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    with pytest.raises(ConfigError, match=r"importance='taylor': the loss depends on no weight.*under no_grad"):
        planned("taylor", data=DATA, forward=forward)


@pytest.mark.parametrize("batch", [([X[0], X[1]], torch.tensor([0, 1])), (X, torch.tensor([0])), ("a", 3)])
def test_batches_that_can_not_be_cut(batch: Any) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(X)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()

    settings = {"data": [batch], "forward": forward, "loss": loss}
    with pytest.raises(ConfigError, match=r"can't be cut into samples: it.*Taylor\(per='batch'\)"):
        planned("taylor", **settings)
    assert planned(Taylor(per="batch"), **settings).cuts


def test_mappings_are_cut_too() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        assert outputs.shape[0] == 1
        return nn.functional.cross_entropy(outputs, batch["y"])

    batch = UserDict({"x": X, "y": torch.tensor([0, 1])})
    assert planned("taylor", data=[batch], forward=forward, loss=loss).cuts


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.tail = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 3:
            return self.tail(self.b(x).relu())
        return self.head(self.a(x).relu())


@pytest.mark.parametrize("criterion", [APoZ(), MeanActivation(), Reconstruction()])
def test_layers_that_do_not_run_on_the_data(criterion: Importance) -> None:
    short, long = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ConfigError, match=r"group b: 6 of its 6 channels were read by no layer while the data ran"):
        fxslim.plan_pruning(Branches(), [short, long], importance=criterion, data=[short])
    assert fxslim.plan_pruning(Branches(), [short, long], importance=criterion, data=[short, long]).cuts


def test_reconstruction_needs_readers() -> None:
    x = torch.randn(3, 10, 8)
    with pytest.raises(ConfigError, match=r"group attention\S*: \d+ of its \d+ channels were read by no layer"):
        fxslim.plan_pruning(Transformer("fused"), x, importance="reconstruction", data=[x], heads="dim")
