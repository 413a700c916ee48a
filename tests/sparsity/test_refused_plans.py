# SPDX-License-Identifier: Apache-2.0
"""Bad input is named, and errors change nothing."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim import CalibrationError, ConfigError, UnsupportedLayerError
from fxslim.patterns import Block
from fxslim.sparsity import mask_choice, sparsity_plan
from tests.pruning.small_models import snapshot
from tests.sparsity.small_networks import ReadsAttention, ReadsKept, batches, small_net

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pattern": "2:4", "ratio": 0.7}, ConfigError, r"ratio=0.7 contradicts 2:4"),
    ({"pattern": Block(ratio=0.3), "ratio": 0.5}, ConfigError, "give the ratio once"),
    ({"pattern": "2:5:1"}, ConfigError, "unknown pattern '2:5:1'"),
    ({"pattern": "cin32cout64", "ratio": 1.0}, ConfigError, r"ratio=1.0 must be in \[0, 1\)"),
    ({"method": "hesian"}, ConfigError, "did you mean 'hessian'"),
    ({"method": "hessian"}, ConfigError, "method 'hessian' looks at data: give data="),
    ({"scope": "adaptive", "pattern": "unstructured"}, ConfigError, "scope='adaptive' looks at data"),
    ({"scope": "global"}, ConfigError, "scope='global' gives layers ratios of their own, and 2:4 has one"),
    ({"scope": "all"}, ConfigError, "unknown scope 'all'"),
    ({"progressive": -1}, ConfigError, "progressive must be True, False or a number of stages, got -1"),
    ({"layers": "nowhere"}, ConfigError, "unknown layer 'nowhere'"),
    ({"layers": "1"}, UnsupportedLayerError, "layers: '1' is"),
    ({"layers": nn.Embedding}, UnsupportedLayerError, "masks are for linear layers"),
    ({"overrides": {"7": 1.5}}, ConfigError, r"the ratio of 7=1.5 must be in \[0, 1\)"),
    ({"update_freq": -1}, ConfigError, "update_freq must be None or an integer >= 0"),
    ({"gradient": "ste"}, ConfigError, "unknown gradient 'ste'; did you mean 'sr_ste'"),
    ({"ineligible": "raise"}, ConfigError, "unknown ineligible"),
    ({"pattern": "cin32cout64", "ineligible": "error"}, UnsupportedLayerError, "3.weight: it has 2 groups"),
    ({"forward": lambda model, batch: model(batch)}, ConfigError, "give data= with them"),
    ({"method": "wanda", "data": []}, ConfigError, "data has no batches"),
    ({"method": "first_order", "data": [torch.zeros(2, 8, 9, 9)]}, ConfigError, "has no target"),
    ({"method": "wanda", "data": [torch.zeros(2, 3, 9, 9)]}, CalibrationError, "batch 0 of data"),
    ({"method": "hessian", "data": [torch.zeros(0, 8, 9, 9)]}, CalibrationError, "data without a sample"),
    ({"pattern": "unstructured", "ratio": 0.9999}, ConfigError, "entries: unstructured 100% would remove all"),
    (
        {"method": "first_order", "data": [torch.zeros(2, 8, 9, 9)], "loss": lambda outputs, batch: outputs[9]},
        CalibrationError,
        "the loss of batch 0 of data failed: IndexError",
    ),
    (
        {"method": "first_order", "data": [torch.zeros(2, 8, 9, 9)], "loss": lambda outputs, _: outputs.sum().detach()},
        CalibrationError,
        "the loss of batch 0 of data has no gradient",
    ),
    ({"layers": 3}, ConfigError, "layers takes names, globs and types of layers, got 3"),
    ({"skip": [nn.Linear(2, 2)]}, ConfigError, "skip takes names, globs and types"),
    ({"overrides": {0: 0.5}}, ConfigError, "overrides takes names, globs and types of layers, got 0"),
    ({"overrides": [("0", 0.5)]}, ConfigError, "overrides must be a dict of layers, got a list"),
    (
        {"example_inputs": torch.zeros(2, 3, 9, 9)},
        ConfigError,
        r"failed on example_inputs Inputs\(Tensor\(2, 3, 9, 9\)",
    ),
    ({"chip": "TX510"}, ConfigError, "no layer is left to make sparse\n.*TX510 has no weight sparsity"),
    ({"chip": "TX99"}, ConfigError, "unknown chip 'TX99'"),
]


@pytest.mark.parametrize("wishes, error, words", REFUSED)
def test_bad_input_is_named_and_changes_nothing(wishes: dict[str, Any], error: type[Exception], words: str) -> None:
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters())
    before, kinds = snapshot(model, optimizer), [type(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        fxslim.sparsify(model, optimizer=optimizer, **wishes)
    assert snapshot(model, optimizer) == before
    assert [type(m) for m in model.modules()] == kinds


def test_weights_without_numbers_and_layers_without_channels(caplog: pytest.LogCaptureFixture) -> None:
    model = small_net()
    with torch.no_grad():
        model[7].weight[2, 3] = torch.nan
    with pytest.raises(ConfigError, match=r"7\.weight has NaN or infinity in 1 of 768 entries"):
        fxslim.sparsify(model, "2:4")
    with torch.no_grad():
        model[7].weight.zero_()
    with caplog.at_level(logging.WARNING):
        plan = fxslim.plan_sparsity(model, "2:4")
    assert "7.weight stays dense: all its entries are 0" in caplog.text
    assert plan.notes == ("7.weight stays dense: all its entries are 0",)
    thin = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    notes = fxslim.plan_sparsity(thin, "2:4").notes
    assert [note.split(":")[0] for note in notes] == ["0.weight stays dense", "1.weight stays dense"]
    assert "1 input channels in each group" in notes[1]


def test_weights_that_change_between_planning_and_applying() -> None:
    model = small_net()
    plan = fxslim.plan_sparsity(model, "2:4")
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"3\.weight has NaN or infinity"):
        plan.apply(model)
    assert snapshot(model) == before
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("broken", [0, 1, 2, 3, "forward"])
@pytest.mark.parametrize("progressive", [False, True])
def test_any_failure_of_apply_changes_nothing(
    broken: int | str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each mask that is set, and at the end."""
    model, calls, plain = small_net(), 0, mask_choice.Weight.set
    optimizer = torch.optim.Adam(model.parameters())
    model(batches()[0][0]).sum().backward()
    optimizer.step()
    before, kinds = snapshot(model, optimizer), [type(m) for m in model.modules()]
    plan = fxslim.plan_sparsity(model, "2:4", method="hessian", data=batches(), progressive=progressive)

    def interrupted(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > int(broken):
            raise KeyboardInterrupt
        plain(self, *args)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    if broken == "forward":
        monkeypatch.setattr(sparsity_plan, "try_forward", fails)
    else:
        monkeypatch.setattr(mask_choice.Weight, "set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model, optimizer=optimizer)
    assert snapshot(model, optimizer) == before
    assert [type(m) for m in model.modules()] == kinds


def test_projections_of_attention_handed_to_functions_are_found() -> None:
    """Other layers can be masked there: tests/sparsity/test_handed_over.py."""
    plan = fxslim.plan_sparsity(ReadsAttention(), "2:4", example_inputs=torch.randn(2, 8))
    assert [one.name for one in plan.weights] == ["first.weight", "attn.out_proj.weight"]
    assert "attn.in_proj_weight stays dense: the model hands its weight to a function" in plan.notes[0]
    with pytest.raises(UnsupportedLayerError, match=r"attn\.in_proj_weight: the model hands"):
        fxslim.plan_sparsity(ReadsAttention(), "2:4", data=[torch.randn(2, 8)], method="wanda", ineligible="error")


KEEPS: dict[str, Any] = {
    "an attribute": lambda net: {"weight": net.second.weight},
    "_parameters": lambda net: net.second._parameters,
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seen_by", ["example_inputs", "data"])
def test_weights_that_are_read_past_their_masks_are_refused(keep: str, seen_by: str) -> None:
    model, x = ReadsKept(), torch.randn(2, 8)
    model.kept = KEEPS[keep](model)
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    wishes: dict[str, Any] = {seen_by: x if seen_by == "example_inputs" else [x]}
    with pytest.raises(UnsupportedLayerError, match=r"second\.weight: the model reads the stored weight itself"):
        fxslim.sparsify(model, "2:4", **wishes)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in model.modules())
    fxslim.sparsify(model, "2:4", skip="second", **wishes)
    assert type(model.first) is fxslim.nn.MaskedLinear


def test_shared_masked_and_computed_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[2])
    notes = fxslim.plan_sparsity(model, "2:4").notes
    assert [note.split(" stays")[0] for note in notes] == ["0.weight", "1.weight", "2.weight"]
    assert "shared with another layer" in notes[0]
    assert "remove_parametrizations" in notes[2]
    masked = fxslim.sparsify(small_net(), "2:4", layers=nn.Linear)
    assert "it has a mask already" in fxslim.plan_sparsity(masked, "2:4").notes[0]


def test_plans_of_other_models_and_without_values() -> None:
    plan = fxslim.plan_sparsity(small_net(), "2:4")
    with pytest.raises(fxslim.PlanError, match="has no module 3"):
        plan.check(nn.Sequential(nn.Conv2d(8, 8, 3)))
    with pytest.raises(fxslim.PlanError, match=r"has no 0\.weight"):
        plan.check(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()))
    wrapped = nn.ModuleDict({"module": plan.apply(small_net())})
    assert all(found.ok for found in plan.check(wrapped).values())
    with pytest.raises(ConfigError, match=r"scope='global' ranks weights, and 0\.weight is on the meta device"):
        fxslim.plan_sparsity(small_net().to("meta"), "unstructured", scope="global")


def test_matrices_that_can_have_no_mask_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"read": nn.LSTM(8, 8), "pair": nn.Bilinear(8, 8, 4), "head": nn.Linear(8, 4)})
    plan = fxslim.plan_sparsity(model, "2:4", skip="pair")
    assert plan.notes == ("read stays dense: masks are for no LSTM",)
    assert plan.notes[0] in caplog.text
    assert fxslim.plan_sparsity(model, "2:4", layers="head").notes == ()
    with pytest.raises(UnsupportedLayerError, match="read: masks are for no LSTM; name it in skip="):
        fxslim.plan_sparsity(model, "2:4", ineligible="error")
