# SPDX-License-Identifier: Apache-2.0
"""Plans: targets, the table, files, errors; applying: atomic, optimizers, old graphs, wrappers."""

import json

import pytest
import torch
from torch import nn

import fxslim
from fxslim import CheckpointError, ConfigError, PlanError, TraceError, UnsupportedLayerError
from tests.graph.random_networks import RandomNetwork
from tests.pruning.small_models import X, assert_unchanged, small, snapshot


@pytest.mark.parametrize("target", ["macs", "params", "channels"])
@pytest.mark.parametrize("importance", ["l1", "l2", "bn", "random"])
def test_targets_and_importances(target: str, importance: str) -> None:
    plan = fxslim.plan_pruning(small(), X, ratio=0.4, target=target, importance=importance)
    share = {
        "macs": 1 - plan.macs[1] / plan.macs[0],
        "params": 1 - plan.params[1] / plan.params[0],
        "channels": 1 - sum(r.after for r in plan.rows) / sum(r.before for r in plan.rows),
    }[target]
    assert share == pytest.approx(0.4, abs=0.06)
    assert plan.verify(small(), X).ok


def test_planned_cost_is_the_real_cost() -> None:
    model = RandomNetwork(3)
    plan = fxslim.plan_pruning(model, torch.randn(1, 3, 8, 8), ratio=0.4)
    plan.apply(model)
    assert sum(p.numel() for p in model.parameters()) == plan.params[1]
    assert fxslim.trace(model, torch.randn(1, 3, 8, 8)).cost.macs == plan.macs[1]


def test_l2_removes_the_smallest_channels_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[0].weight[[1, 6]] *= 1e-3
        model[2].weight[:, [1, 6]] *= 1e-3
    plan = fxslim.plan_pruning(model, X, ratio=0.25, target="channels")
    assert {c.keep for c in plan.cuts} == {(0, 2, 3, 4, 5, 7)}


def test_a_users_importance_is_used_and_checked() -> None:
    model = small()
    plan = fxslim.plan_pruning(model, X, ratio=0.5, target="channels", importance=lambda g, m: torch.arange(len(g)))
    assert plan.cuts[0].keep == tuple(range(plan.cuts[0].keep[0], 16))
    for wrong, message in (
        (lambda g, m: torch.ones(3), "shape"),
        (lambda g, m: torch.full((len(g),), torch.nan), "not finite"),
    ):
        with pytest.raises(ConfigError, match=f"importance of group 0.*{message}"):
            fxslim.plan_pruning(model, X, importance=wrong)


def test_same_seed_same_plan() -> None:
    plans = [fxslim.plan_pruning(small(), X, importance="random", seed=s).to_dict() for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_planning_touches_nothing() -> None:
    model = small().train()
    model[0].eval()
    before, state = snapshot(model), torch.get_rng_state()
    fxslim.plan_pruning(model, X).verify(model, X)
    assert_unchanged(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model][:2] == [False, True]


class LiteralSize(nn.Module):
    """Reads a size that is written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 14 * 14, 2)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 8 * 14 * 14))


def test_a_size_written_as_a_number_freezes_with_file_and_line() -> None:
    with pytest.raises(PlanError, match=r"conv: view\(-1, 1568\) at test_pruning.py:\d+ has fixed sizes"):
        fxslim.plan_pruning(LiteralSize(), X, ratio=0.4)


def test_plans_in_files(tmp_path) -> None:
    model = small()
    plan = fxslim.plan_pruning(model, X)
    plan.save(tmp_path / "plan.json")
    loaded = fxslim.load_plan(tmp_path / "plan.json")
    assert str(loaded) == str(plan)
    first, second = plan.apply(model), loaded.apply(small())
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert [type(p).__name__ for p in fxslim.applied(second)] == ["PruningPlan"]
    data = plan.to_dict()
    for wrong, message in (
        ("", "can't be read as a plan"),
        (json.dumps({"a": 1}), "no 'kind'"),
        (json.dumps({**data, "kind": "prunning"}), "did you mean 'pruning'"),
        (json.dumps({**data, "version": 9}), "version 9"),
        (json.dumps({**data, "cuts": [["a"]]}), "damaged"),
    ):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=message):
            fxslim.load_plan(tmp_path / "wrong.json")


def test_a_plan_for_another_model_names_the_first_difference() -> None:
    plan = fxslim.plan_pruning(small(), X)
    other = small()
    other[3] = nn.Conv2d(16, 32, 3, bias=False)
    with pytest.raises(PlanError, match=r"3.weight is \(32, 16, 3, 3\), the plan was made for \(24, 16, 3, 3\)"):
        plan.apply(other)
    with pytest.raises(PlanError, match="does not fit"):
        plan.apply(plan.apply(small()))


def test_pruned_twice_and_under_a_compile_wrapper() -> None:
    model = fxslim.prune(small(), X, ratio=0.3)
    plan = fxslim.plan_pruning(model, X, ratio=0.3)
    assert plan.verify(model, X).ok
    plan.apply(torch.compile(model, backend="eager"))
    assert len(fxslim.applied(model)) in (1, 2)
    assert model(X).shape == (2, 5)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"ratio": 1.0}, ConfigError, "ratio=1.0 must be in"),
        ({"ratio": -0.1}, ConfigError, "ratio=-0.1"),
        ({"ratio": "half"}, ConfigError, "ratio='half'"),
        ({"target": "mac"}, ConfigError, "unknown target 'mac'; did you mean 'macs'"),
        ({"importance": "l3"}, ConfigError, "unknown importance 'l3'; did you mean"),
        ({"skip": "conv1"}, ConfigError, "skip: unknown layer 'conv1'"),
        ({"ratio": 0.99}, PlanError, "ratio=0.99 of macs can't be reached: of 582,456 at least"),
        ({"skip": [nn.Conv2d]}, PlanError, "can't be reached"),
    ],
)
def test_bad_settings(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fxslim.plan_pruning(small(), X, **settings)


def test_bad_models_and_inputs() -> None:
    with pytest.raises(
        TraceError, match=r"own forward failed while it was recorded in eval mode with Inputs\(Tensor\(2, 4, 8, 8\)\)"
    ):
        fxslim.trace(small(), torch.randn(2, 4, 8, 8))
    with pytest.raises(UnsupportedLayerError, match="DataParallel: apply before wrapping"):
        fxslim.trace(nn.DataParallel(small()), X)
    with pytest.raises(ConfigError, match="empty list"):
        fxslim.trace(small(), [])
    with pytest.raises(PlanError, match="no channels can be removed"):
        fxslim.plan_pruning(nn.Conv2d(3, 4, 3), X)
    with pytest.raises(ConfigError, match="unknown layer 'O'"):
        fxslim.trace(small(), X).explain("O")


def test_skip_takes_names_globs_and_types() -> None:
    for skip in ("0", ["0"], ["[0]"], [nn.Conv2d]):
        try:
            plan = fxslim.plan_pruning(small(), X, ratio=0.2, skip=skip)
        except PlanError:
            assert skip == [nn.Conv2d]
            continue
        assert {c.name for c in plan.cuts if c.dim == 0} == {
            "3.weight",
            "4.weight",
            "4.bias",
            "4.running_mean",
            "4.running_var",
        }


def test_outputs_that_are_nan_prove_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 4)
    plan = fxslim.plan_pruning(model, x, ratio=0.5)
    with torch.no_grad():
        model[2].bias[1] = torch.nan
    proof = plan.verify(model, x)
    assert not proof.ok
    assert "2 of 6 entries that the model returns are NaN" in str(proof)
