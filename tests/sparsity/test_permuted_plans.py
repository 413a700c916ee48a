# SPDX-License-Identifier: Apache-2.0
"""plan_sparsity(permute=True): more is kept, nothing else changes, and plans hold the order."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxslim
from fxslim import CheckpointError, ConfigError, PlanError, SparsityPlan
from fxslim.graph.reordering import interchangeable_channels, reordering_cuts
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.sparsity.reordering_proof import ReorderingProof, exact_parts
from tests.graph.random_networks import RandomNetwork, randomise
from tests.pruning.small_models import assert_unchanged, snapshot
from tests.sparsity.permutable_networks import NETWORKS, PICTURE, Attention, Residual, Split, made
from tests.sparsity.small_networks import batches, small_net

FAMILIES = [*NETWORKS, *(pytest.param(lambda seed=seed: RandomNetwork(seed), id=f"random{seed}") for seed in range(40))]


def change(model: nn.Module, cuts: tuple[Cut, ...], x: Tensor) -> float:
    """The largest relative change of outputs in float64."""
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        before = double(x.double())
        Surgery(double, cuts).commit(Changes())
        return float((double(x.double()) - before).abs().max() / before.abs().max())


def shuffled(model: nn.Module, x: Tensor, sets: list[np.ndarray] | None = None) -> tuple[Cut, ...]:
    """Everything that can change places does, at random."""
    graph, random = fxslim.trace(model, x), np.random.default_rng(0)
    places = np.arange(len(graph.resolved.classes))
    for channels in interchangeable_channels(graph) if sets is None else sets:
        places[channels] = random.permutation(channels)
    return reordering_cuts(graph.resolved, graph.state_shapes, places)


def magnitude(model: nn.Module, plan: SparsityPlan) -> float:
    states = dict(plan.apply(copy.deepcopy(model)).state_dict())
    return sum(float((states[w.name] * states[w.name + "_mask"]).abs().sum()) for w in plan.weights)


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_order_of_interchangeable_channels_is_exact(kind: Any) -> None:
    model = made(kind)
    cuts = shuffled(model, PICTURE)
    assert cuts
    assert change(model, cuts, torch.randn(2, 3, 8, 8)) < 1e-12


def test_channels_of_one_group_that_are_not_alike_stay_apart() -> None:
    model = made(Split)
    groups = [group.channels for group in fxslim.trace(model, PICTURE).groups]
    assert change(model, shuffled(model, PICTURE, groups), PICTURE) > 1e-3
    assert change(model, shuffled(model, PICTURE), PICTURE) < 1e-12


@pytest.mark.parametrize("kind", FAMILIES)
def test_plans_keep_more_and_are_exact(kind: Any) -> None:
    model = made(kind)
    before = snapshot(model)["values"]
    wishes: dict[str, Any] = {"example_inputs": PICTURE, "ineligible": "ignore"}
    plan = fxslim.plan_sparsity(model, "2:4", permute=True, **wishes)
    assert_unchanged(before, snapshot(model)["values"])
    assert change(model, plan.orders, torch.randn(2, 3, 8, 8)) < 1e-9
    assert not any("differ" in note for note in plan.notes)
    plain = magnitude(model, fxslim.plan_sparsity(model, "2:4", **wishes))
    assert magnitude(model, plan) > plain if plan.orders else magnitude(model, plan) == plain
    assert plan.orders or kind not in NETWORKS
    found = fxslim.plan_sparsity(model, "2:4", permute=True, **wishes)
    assert found.to_dict() == plan.to_dict()


def test_readers_of_a_shared_group_share_its_order() -> None:
    model = made(Residual)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=PICTURE, permute=True)
    orders = {(cut.name, cut.dim): cut.keep for cut in plan.orders}
    places = [("stem.weight", 0), ("stem.bias", 0), ("inner.weight", 1), ("norm.running_var", 0), ("head.weight", 1)]
    assert len({orders[place] for place in places}) == 1
    assert ("stem.weight", 1) not in orders
    assert ("head.weight", 0) not in orders


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "vit_b_16"])
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 96}
    if name == "vit_b_16":
        model: nn.Module = torchvision.models.VisionTransformer(**sizes)
    else:
        model = torchvision.models.get_model(name, weights=None)
    model, x = randomise(model).eval(), torch.randn(2, 3, 32, 32)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=x, permute=True, ineligible="ignore")
    assert len(plan.orders) > 10
    assert change(model, plan.orders, torch.randn(1, 3, 32, 32)) < 1e-9
    assert change(model, shuffled(model, x), x) < 1e-12


def test_uneven_channels_gain_most() -> None:
    gains = []
    for uneven in (False, True):
        model = made(Residual)
        if uneven:
            with torch.no_grad():
                for layer in (model.inner, model.head):
                    wide = (1, -1, *[1] * (layer.weight.dim() - 2))
                    layer.weight.mul_(torch.rand(16).pow(3).view(wide))
        wishes: dict[str, Any] = {"example_inputs": PICTURE}
        plain = magnitude(model, fxslim.plan_sparsity(model, "2:4", **wishes))
        gains.append(magnitude(model, fxslim.plan_sparsity(model, "2:4", permute=True, **wishes)) / plain)
    assert gains[0] > 1.005
    assert gains[1] > 1.02


@pytest.mark.parametrize("kind", [Residual, Attention])
def test_saved_and_replayed(kind: Any, tmp_path: Path) -> None:
    model = made(kind)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=PICTURE, permute=True)
    plan.save(tmp_path / "plan.json")
    read = fxslim.load_plan(tmp_path / "plan.json")
    assert [(c.name, c.dim, c.keep, c.blocks) for c in sorted(read.orders, key=str)] == [
        (c.name, c.dim, c.keep, c.blocks) for c in sorted(plan.orders, key=str)
    ]
    replayed = read.apply(copy.deepcopy(model))
    plan.apply(model)
    states = replayed.state_dict()
    assert all(torch.equal(states[name], state) for name, state in model.state_dict().items())
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(made(kind, seed=7), tmp_path / "model.safetensors")
    assert torch.equal(loaded(PICTURE), model(PICTURE))
    (again,) = fxslim.applied(loaded)
    assert again.orders == read.orders


def test_damaged_orders_are_refused() -> None:
    data = fxslim.plan_sparsity(made(Residual), "2:4", example_inputs=PICTURE, permute=True).to_dict()
    short = copy.deepcopy(data)
    short["orders"][0][0] = "0-3"
    with pytest.raises(CheckpointError, match="has 4 entries, not those of"):
        SparsityPlan.from_dict(short)
    unknown = copy.deepcopy(data)
    unknown["orders"][0][1][0][0] = "other.weight"
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        SparsityPlan.from_dict(unknown)


def wide() -> nn.Sequential:
    """Weights that are large enough to be taken apart while they are cut."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 8)).eval()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8, generator=random)).square().mean().backward()
        optimizer.step()


def test_failure_leaves_everything_as_it_was() -> None:
    model = wide()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer, 2)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=torch.randn(2, 8), permute=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("no forward")

    model[4].register_forward_hook(fail)
    before = snapshot(model, optimizer)
    with pytest.raises(PlanError, match="no forward"):
        plan.apply(model, optimizer=optimizer)
    assert_unchanged(before, snapshot(model, optimizer))


def test_training_goes_on_in_the_new_order() -> None:
    """Adam's state moves along: with masks that keep everything, the steps are those of the model as it was."""
    model, plain = wide(), wide()
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (model, plain)]
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        trained(one, optimizer, 3)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=torch.randn(2, 8), permute=True)
    assert len(plan.orders) == 6
    state = {p: {k: v.clone() for k, v in kept.items()} for p, kept in optimizers[0].state.items()}
    changes = Changes()
    Surgery(model, plan.orders, optimizers[0]).commit(changes)
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        trained(one, optimizer, 5)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    changes.undo()
    assert all(state[p].keys() == kept.keys() for p, kept in optimizers[0].state.items())
    masked = wide()
    optimizer = torch.optim.Adam(masked.parameters(), lr=1e-2)
    trained(masked, optimizer, 3)
    fxslim.plan_sparsity(masked, "2:4", example_inputs=x, permute=True).apply(masked, optimizer=optimizer)
    loss = masked(x).square().mean().item()
    trained(masked, optimizer, 30)
    assert masked(x).square().mean().item() < loss


def test_orders_that_are_not_exact_are_found_out() -> None:
    model = made(Residual)
    (inputs,) = fxslim.graph.inputs.as_inputs(PICTURE)
    proof = ReorderingProof(model, [inputs])
    good = shuffled(model, PICTURE)
    assert proof.holds(good)
    assert not proof.holds(good[1:])
    assert proof.holds(good)
    bad = Cut(name="head.bias", dim=0, keep=(1, 0, 2, 3, 4, 5))
    assert exact_parts([good, (bad,)], lambda some: proof.holds([cut for cuts in some for cut in cuts])) == [good]


class ByNumber(nn.Module):
    """Weighs channels by numbers that it keeps outside of parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.linspace(0, 1, 16, dtype=x.dtype))


def test_channels_that_the_forward_numbers_stay() -> None:
    plan = fxslim.plan_sparsity(ByNumber(), "2:4", example_inputs=torch.randn(2, 8), permute=True)
    assert not plan.orders
    assert "no order of channels keeps more" in str(plan)


def test_what_can_not_be_permuted() -> None:
    model, x = made(Residual), PICTURE
    with pytest.raises(ConfigError, match="give example_inputs="):
        fxslim.plan_sparsity(model, "2:4", permute=True)
    with pytest.raises(ConfigError, match="unstructured 50% does not go by neighbouring inputs"):
        fxslim.plan_sparsity(model, "unstructured", permute=True, example_inputs=x)
    with pytest.raises(ConfigError, match="2:4 along outputs does not go by"):
        fxslim.plan_sparsity(model, fxslim.patterns.NM(2, 4, axis=0), permute=True, example_inputs=x)
    with pytest.raises(ConfigError, match="these are on the meta device"):
        fxslim.plan_sparsity(model, "2:4", permute=True, example_inputs=x.to("meta"))
    with pytest.raises(ConfigError, match=r"weights, and stem\.weight is on the meta device"):
        fxslim.plan_sparsity(copy.deepcopy(model).to("meta"), "2:4", permute=True, example_inputs=x)
    model.lock = (i for i in range(3))
    with pytest.raises(ConfigError, match="can't be copied"):
        fxslim.plan_sparsity(model, "2:4", permute=True, example_inputs=x)


def test_other_patterns_of_some_layers_are_left_out() -> None:
    plan = fxslim.plan_sparsity(
        made(Residual), "2:4", permute=True, example_inputs=PICTURE, overrides={"inner": "unstructured", "head": "1:4"}
    )
    assert {cut.name for cut in plan.orders} >= {"stem.weight", "inner.weight", "head.weight"}


@pytest.mark.parametrize("method", ["l2", "first_order", "wanda", "par_v2", "hessian"])
def test_every_method_has_an_order_of_its_own(method: str) -> None:
    model, x = small_net(), batches()[0][0]
    wishes: dict[str, Any] = {"example_inputs": x, "data": batches(), "permute": True}
    plan = fxslim.plan_sparsity(model, "2:4", method=method, **wishes)
    by_magnitude = fxslim.plan_sparsity(model, "2:4", **wishes)
    assert len(plan.orders) == len(by_magnitude.orders) == 6
    assert plan.orders != by_magnitude.orders
    assert change(model, plan.orders, x) < 1e-12
    plan.apply(model)
    assert all(found.ok for found in plan.check(model).values())


def test_scores_of_the_method_are_what_is_kept() -> None:
    model = small_net()
    wishes: dict[str, Any] = {"example_inputs": batches()[0][0], "data": batches(), "method": "wanda"}
    plan = fxslim.plan_sparsity(model, "2:4", permute=True, **wishes)
    assert "of a weight's wanda scores on average" in plan.notes[-1]
    (after, before) = (float(word.rstrip("%")) for word in plan.notes[-1].split() if word.endswith("%"))
    assert after > before + 0.5
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(ConfigError, match=r"0\.weight has NaN or infinity in 72 of"):
        fxslim.plan_sparsity(model, "2:4", permute=True, **wishes)
