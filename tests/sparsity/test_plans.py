# SPDX-License-Identifier: Apache-2.0
"""Plans of sparsity: what they choose, and that what they wrote can be read again."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxslim
from fxslim import CheckpointError, ConfigError, PlanError, SparsityPlan
from fxslim.patterns import NM, Block, Unstructured, check
from fxslim.sparsity import Hessian, Par, bake
from fxslim.sparsity.global_ranking import fill
from tests.sparsity.small_networks import batches, small_net

METHODS = ["magnitude", "l2", "first_order", "wanda", "par", "par_v2", "hessian"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "cin8cout16", "unstructured", NM(2, 4, axis=0)])
def test_masks_follow_the_pattern(pattern: Any, method: str) -> None:
    """Exactly: as many as the pattern says, in every layer, whatever chose them; the plan's own check agrees."""
    model, data = small_net(), batches()
    plan = fxslim.plan_sparsity(model, pattern, method=method, data=data, ineligible="ignore")
    before = copy.deepcopy(model)
    plan.apply(model)
    assert len(plan.weights) == (3 if pattern == "cin8cout16" else 4)
    for name, found in plan.check(model).items():
        layer, own = model.get_submodule(name.removesuffix(".weight")), plan.weights[0].settings.pattern
        assert found.ok, name
        assert check(layer.weight_mask.float(), own).ok
        if isinstance(own, Block):
            zero = ~own.any_in_block(layer.weight_mask)
            assert int(zero.sum()) == own.num_removed(tuple(layer.weight.shape))
        if isinstance(own, Unstructured) and not own.per_output:
            assert int((~layer.weight_mask).sum()) in {round(0.5 * layer.weight_mask.numel())} | (
                {layer.weight_mask[0].numel() // 2 * len(layer.weight_mask)} if method == "wanda" else set()
            )
        old = before.get_submodule(name.removesuffix(".weight")).weight
        assert (method == "hessian") == (not torch.equal(layer.weight, old))


def test_every_method_chooses_something_else() -> None:
    masks = []
    for method in ["magnitude", "first_order", "wanda", "par", "hessian"]:
        model = fxslim.sparsify(small_net(), "2:4", method=method, data=batches())
        masks.append(torch.cat([model[i].weight_mask.flatten() for i in (0, 3, 7)]))
    assert len({mask.numpy().tobytes() for mask in masks}) == 5


def error_of(model: nn.Module, **settings: Any) -> float:
    x = torch.cat([x for x, _ in batches(2)])
    with torch.no_grad():
        whole = model(x)
        found = fxslim.sparsify(copy.deepcopy(model), data=batches(), ineligible="ignore", **settings)(x)
    return float((found - whole).norm() / whole.norm())


@pytest.mark.parametrize("pattern", ["2:4", "cin8cout8", "unstructured"])
def test_methods_that_look_at_data_break_less(pattern: str) -> None:
    for seed in range(3):
        model = small_net(seed)
        plain = error_of(model, pattern=pattern, method="magnitude")
        assert error_of(model, pattern=pattern, method="hessian") < 0.7 * plain
        assert error_of(model, pattern=pattern, method="par") < plain


def test_names_globs_types_and_overrides() -> None:
    plan = fxslim.plan_sparsity(
        small_net(), "unstructured", ratio=0.5, layers=[nn.Conv2d, "7"], skip="3", overrides={"7": 0.25}
    )
    found = {one.name: one.settings.pattern for one in plan.weights}
    assert found == {"0.weight": Unstructured(0.5), "7.weight": Unstructured(0.25)}
    mixed = fxslim.plan_sparsity(small_net(), "2:4", overrides={nn.Linear: "1:4", "0": 0.0, "3": Unstructured(0.3)})
    assert [str(one.settings.pattern) for one in mixed.weights] == ["unstructured 30%", "1:4", "1:4"]


@pytest.mark.parametrize("scope", ["global", "adaptive"])
@pytest.mark.parametrize("pattern", ["unstructured", "cin8cout4"])
def test_ratios_of_layers_remove_as_much_together(scope: str, pattern: str) -> None:
    settings = {"pattern": pattern, "ratio": 0.6, "method": "par", "data": batches(), "ineligible": "ignore"}
    plan = fxslim.plan_sparsity(small_net(), scope=scope, **settings)
    ratios = [one.settings.pattern.removed() for one in plan.weights]
    sizes = [torch.Size(plan.shapes[one.name]).numel() for one in plan.weights]
    total = sum(r * s for r, s in zip(ratios, sizes, strict=True)) / sum(sizes)
    assert total == pytest.approx(0.6, abs=0.01 if pattern == "unstructured" else 0.04)
    assert max(ratios) - min(ratios) > 0.05


def test_adaptive_ratios_break_less() -> None:
    for method in ("magnitude", "hessian"):
        shares = []
        for seed in range(8):
            settings = {"pattern": "unstructured", "ratio": 0.7, "method": method}
            model = small_net(seed)
            shares.append(error_of(model, scope="adaptive", **settings) / error_of(model, **settings))
        assert max(shares) < 1, (method, shares)


def test_global_is_one_ranking() -> None:
    """The lowest half of all weights, wherever they are."""
    model = small_net()
    plan = fxslim.plan_sparsity(model, "unstructured", ratio=0.5, scope="global")
    layers = [model.get_submodule(one.name.removesuffix(".weight")) for one in plan.weights]
    weights = [layer.weight.detach().abs() for layer in layers]
    median = torch.cat([weight.flatten() for weight in weights]).median()
    plan.apply(model)
    for layer, weight in zip(layers, weights, strict=True):
        below = float((weight <= median).float().mean())
        assert 1 - float(layer.weight_mask.float().mean()) == pytest.approx(below, abs=2e-3)


def test_many_entries_are_counted_one_by_one() -> None:
    """More than 2^24 of them, where float32 stops counting."""
    num = 3 * 2**23
    removed, units = fill(np.ones(num, dtype=np.float32), np.arange(num) % 2, np.array([num, num]), num * 0.75)
    assert removed.tolist() == units.tolist() == [num * 0.375, num * 0.375]


def test_progressive_sees_what_sparse_layers_make() -> None:
    """The statistics of later layers are those of the masked model."""
    model = fxslim.sparsify(small_net(), "unstructured", ratio=0.8, method="wanda", progressive=True, data=batches())
    read = model[:7](torch.cat([x for x, _ in batches()])).detach()
    scores = model[7].weight.detach().abs() * read.square().sum(0).sqrt()
    assert torch.equal(model[7].weight_mask, Unstructured(0.8, per_output=True).mask(scores))
    staged = fxslim.sparsify(small_net(), "2:4", method="hessian", progressive=2, data=batches())
    assert all(check(staged[i], "2:4").ok for i in (0, 3, 7, 9))


class Block3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.head = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.attn(x)))


def test_attention_and_mlp_have_ratios_of_their_own() -> None:
    method = Par(version=2, attention_ratio=0.25, mlp_ratio=0.75)
    plan = fxslim.plan_sparsity(Block3(), "unstructured", method=method, data=[torch.randn(4, 8)])
    assert [one.settings.pattern.removed() for one in plan.weights] == [0.25, 0.75, 0.5]
    with pytest.raises(ConfigError, match=r"mlp_ratio=0.5: no layer has one of"):
        fxslim.plan_sparsity(small_net(), "unstructured", method=Par(mlp_ratio=0.5), data=batches())


def test_save_load_replay(tmp_path: Any) -> None:
    model, x = small_net(), batches()[0][0]
    plan = fxslim.plan_sparsity(
        model, "2:4", method=Hessian(damping=0.1), data=batches(), update_freq=3, gradient="sr_ste",
        schedule=fxslim.schedules.AGPSchedule(end=0.5, steps=4, start=0.25), example_inputs=x,
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    again = fxslim.load_plan(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    assert str(again) == str(plan)
    with pytest.raises(PlanError, match="method 'hessian' looks at data, which plans don't keep in files"):
        again.apply(small_net())
    assert torch.equal(again.apply(small_net(), data=batches())(x), plan.apply(model)(x))
    with pytest.raises(PlanError, match="does not fit"):
        again.apply(model)
    for key in ("weights", "method", "shapes"):
        with pytest.raises(CheckpointError, match="damaged"):
            SparsityPlan.from_dict({**plan.to_dict(), key: 5})


@pytest.mark.parametrize("order", ["prune, mask", "mask, prune", "mask, prune, bake", "prune, mask, bake, prune"])
def test_compressions_in_any_order_are_saved_and_loaded(order: str, tmp_path: Any) -> None:
    model = small_net()
    x = torch.cat([x for x, _ in batches()])
    for step in order.split(", "):
        if step == "prune":
            plan = fxslim.plan_pruning(model, x, ratio=0.3)
            assert plan.verify(model, x).ok
            plan.apply(model)
        elif step == "mask":
            fxslim.sparsify(model, "2:4", method="hessian", data=batches())
        else:
            before = model(x)
            bake(model)
            assert torch.equal(model(x), before)
            assert not any("mask" in name for name in model.state_dict())
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(small_net(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_optimizers_go_on_and_forget_what_is_masked() -> None:
    model = small_net().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    x, y = batches()[0]
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    layer, weight = model[0], model[0].weight
    optimizer.zero_grad()
    fxslim.sparsify(model, "2:4", optimizer=optimizer)
    assert model[0] is layer
    assert model[0].weight is weight
    masked = ~layer.weight_mask
    assert not optimizer.state[weight]["exp_avg"][masked].any()
    assert optimizer.state[weight]["exp_avg"][~masked].any()
    old = weight.detach().clone()
    nn.functional.cross_entropy(model(x), y).backward()
    assert not weight.grad[masked].any()
    optimizer.step()
    assert not torch.equal(weight[~masked], old[~masked])


def test_the_table() -> None:
    plan = fxslim.plan_sparsity(small_net(), "cin8cout16", skip="9", ineligible="ignore")
    assert str(plan).splitlines() == [
        "weight                 shape  pattern",
        "0.weight            16x8x3x3  cin8cout16 50%",
        "7.weight               24x32  cin8cout16 50%",
        "2 weights by magnitude: 960 of 1,920 entries go",
        "note: 3.weight stays dense: it has 2 groups: blocks run over all input channels, and each filter reads only "
        "some",
    ]
    assert "<td>cin8cout16 50%</td>" in plan._repr_html_()
