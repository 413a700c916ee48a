# SPDX-License-Identifier: Apache-2.0
"""Pruning inside of a training loop, and loss terms that prepare it."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import ConfigError, PlanError, Pruner
from fxslim.errors import CheckpointError
from fxslim.pruning.sparse_learning import GroupLasso, batch_norm_l1
from fxslim.schedules import AGPSchedule, ConstantSchedule, LinearSchedule

SEED = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 3, 8, 8, generator=SEED), torch.randint(0, 4, (16,), generator=SEED)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inside, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + torch.relu(self.inside(x))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "schedule", [AGPSchedule(end=0.5, steps=6), LinearSchedule(end=0.6, steps=8, begin=2, every=2)]
)
def test_masks_grow_and_then_channels_go(kind: str, schedule: Any) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = Pruner(model, X[:1], schedule, optimizer=optimizer)
    macs, gone, losses = fxslim.trace(model, X[:1]).cost.macs, set[tuple[str, int]](), []
    while not pruner.finished:
        losses.append(train_step(model, optimizer))
        changed = pruner.step()
        if pruner.finished:
            break
        assert model.stem.out_channels == 16
        if pruner.plan is not None:
            masked = {
                (c.name, i) for c in pruner.plan.cuts if c.role == "producer" for i in range(16) if i not in c.keep
            }
            assert gone <= masked, "what was masked stays masked"
            gone = masked
            weights = dict(model.state_dict())
            assert all(not weights[name][i].any() for name, i in masked)
            assert abs(pruner.plan.macs[1] / macs - (1 - pruner.ratio)) < 0.06
        assert changed is False or pruner.plan is not None
    assert len(losses) == schedule.begin + schedule.steps + 1
    assert abs(fxslim.trace(model, X[:1]).cost.macs / macs - (1 - schedule.end)) < 0.06
    assert not pruner.step()
    after = [train_step(model, optimizer) for _ in range(20)]
    assert after[-1] < losses[0]


def test_a_schedule_has_a_name() -> None:
    model, other = net(), net()
    named = Pruner(model, X[:1], "linear", ratio=0.4, steps=4)
    made = Pruner(other, X[:1], LinearSchedule(end=0.4, steps=4))
    while not made.finished:
        assert named.step() == made.step()
    assert named.finished
    assert torch.equal(model(X), other(X))


def test_one_shot_is_plan_and_apply() -> None:
    model, other = net(), net()
    pruner = Pruner(model, X[:1], ConstantSchedule(end=0.5, begin=0))
    assert pruner.step()
    assert pruner.step()
    assert pruner.finished
    fxslim.prune(other, X[:1], ratio=0.5)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stopped_after", [1, 3, 6, 9])
def test_a_run_that_was_killed_goes_on_to_the_same_result(stopped_after: int) -> None:
    def start() -> tuple[Net, torch.optim.Optimizer, Pruner]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, Pruner(model, X[:1], AGPSchedule(end=0.5, steps=8, every=2), optimizer=optimizer)

    def run(model: Net, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: int) -> None:
        for _ in range(steps):
            train_step(model, optimizer)
            pruner.step()

    model, optimizer, pruner = start()
    run(model, optimizer, pruner, 12)

    before, its, half = start()
    run(before, its, half, stopped_after)
    states = copy.deepcopy((before.state_dict(), its.state_dict())), json.loads(json.dumps(half.state_dict()))
    resumed, again, third = start()
    if half.finished:
        fxslim.PruningPlan.from_dict(states[1]["plan"]).apply(resumed, optimizer=again, values=False)
    resumed.load_state_dict(states[0][0])
    again.load_state_dict(states[0][1])
    third.load_state_dict(states[1])
    run(resumed, again, third, 12 - stopped_after)
    assert third.finished
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_criterion_that_does_not_see_zeros_keeps_what_was_masked() -> None:
    model = net()
    seeds = iter(range(100))

    def wild(group: fxslim.ChannelGroup, model: nn.Module) -> Tensor:
        return torch.rand(len(group), generator=torch.Generator().manual_seed(next(seeds)))

    pruner, masked = Pruner(model, X[:1], LinearSchedule(end=0.6, steps=6), importance=wild), set[int]()
    while not pruner.finished:
        pruner.step()
        if pruner.plan is not None and not pruner.finished:
            cuts = [cut for cut in pruner.plan.cuts if cut.name == "stem.weight" and cut.dim == 0]
            now = set(range(16)) - set(cuts[0].keep) if cuts else set()
            assert masked <= now
            masked = now


def test_errors_come_before_the_training() -> None:
    schedule = AGPSchedule(end=0.5, steps=3)
    with pytest.raises(ConfigError, match=r"ratio=0.3: the schedule has its own, end=0.5 and steps=3"):
        Pruner(net(), X[:1], schedule, ratio=0.3)
    with pytest.raises(ConfigError, match=r"at_most: the schedule's end \(0.5\)"):
        Pruner(net(), X[:1], schedule, at_most=1000)
    with pytest.raises(ConfigError, match="unknown schedule 'apg'; did you mean 'agp'"):
        Pruner(net(), X[:1], "apg", steps=3)
    with pytest.raises(ConfigError, match="schedule='agp' needs steps="):
        Pruner(net(), X[:1], "agp", ratio=0.5)
    with pytest.raises(ConfigError, match="must rise inside of"):
        Pruner(net(), X[:1], AGPSchedule(end=1.0, steps=3))
    with pytest.raises(PlanError, match="can't be reached"):
        Pruner(net(), X[:1], schedule, skip="*")
    with pytest.raises(CheckpointError, match=r"but this has \['step'\]"):
        Pruner(net(), X[:1], schedule).load_state_dict({"step": 3})


def test_an_error_inside_a_step_leaves_the_mask() -> None:
    model, broken = net(), False

    def sometimes(group: fxslim.ChannelGroup, model: nn.Module) -> Tensor:
        if broken:
            raise ValueError("broken")
        return torch.arange(len(group))

    pruner = Pruner(model, X[:1], LinearSchedule(end=0.6, steps=6), importance=sometimes)
    while pruner.plan is None or not pruner.plan.cuts:
        pruner.step()
    done, plan, broken = pruner.steps_done, pruner.plan, True
    with pytest.raises(ValueError, match="broken"):
        pruner.step()
    assert (pruner.steps_done, pruner.plan) == (done, plan)
    with torch.no_grad():
        model.stem.weight += 1
    model(X)
    cut = next(cut for cut in plan.cuts if cut.name in ("stem.weight", "inside.weight") and cut.dim == 0)
    weight = model.get_parameter(cut.name)
    assert not any(weight[i].any() for i in range(16) if i not in cut.keep)
    broken = False
    assert pruner.step() in (True, False)
    assert pruner.steps_done == done + 1


def test_group_lasso_is_the_sum_of_the_norms_of_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    lasso = GroupLasso(model, torch.randn(1, 3))
    expected = 0.0
    for i in range(5):
        weights = torch.cat([model[0].weight[i], model[0].bias[i : i + 1], model[2].weight[:, i]])
        expected += (len(weights) ** 0.5 * weights.double().norm()).item()
    assert lasso(model).item() == pytest.approx(expected, rel=1e-6)
    lasso(model).backward()
    assert model[2].bias.grad is None
    row = torch.cat([model[0].weight[0], model[0].bias[:1], model[2].weight[:, 0]]).detach()
    assert torch.allclose(model[0].weight.grad[0], (6**0.5 * model[0].weight[0] / row.norm()).detach())


def test_group_lasso_makes_whole_channels_small() -> None:
    def spread(strength: float) -> float:
        model = net()
        optimizer, lasso = torch.optim.Adam(model.parameters(), lr=0.02), GroupLasso(model, X[:1])
        for _ in range(60):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(X), Y) + strength * lasso(model)).backward()
            optimizer.step()
        weights = (model.stem.weight.flatten(1), model.inside.weight.flatten(1), model.head.weight.t())
        sizes = torch.cat(weights, dim=1).detach().norm(dim=1)
        return float(sizes.min() / sizes.max())

    # Some channels fade, others do not.
    assert spread(4e-3) < 0.2 * spread(0.0)


def test_a_channel_of_zeros_gives_no_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2], model[2].weight[:, 2] = 0, 0, 0
    lasso = GroupLasso(model, torch.randn(1, 3))
    lasso(model).backward()
    assert model[0].weight.grad.isfinite().all()
    assert not model[0].weight.grad[2].any()


def test_slimming_adds_the_scales_of_batch_norms() -> None:
    model = net()
    assert batch_norm_l1(model).item() == 16
    batch_norm_l1(model).backward()
    assert torch.equal(model.norm.weight.grad, torch.ones(16))
    assert batch_norm_l1(model, layers=["norm"]).item() == 16
    with pytest.raises(ConfigError, match="no batch norm"):
        batch_norm_l1(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="nothing to make small"):
        GroupLasso(nn.Linear(2, 2), torch.randn(1, 2))
