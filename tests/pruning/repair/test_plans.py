# SPDX-License-Identifier: Apache-2.0
"""A plan with repair: all or nothing, saved without its data, proved without its repair."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, CheckpointError, ConfigError, PlanError, UnsupportedLayerError
from fxslim.pruning.repair.settings import INPUTS, STEPS, Repair
from tests.pruning.repair.oracles import error
from tests.pruning.repair.test_batch_norms import images, trained
from tests.pruning.small_models import assert_unchanged, snapshot
from tests.pruning.test_atomic_apply import Interrupter

REPAIRS = [Repair(steps=STEPS, inputs=inputs) for inputs in INPUTS]
BATCHES = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images()]


def in_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = trained().train()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(images()[0]).square().sum().backward()
        optimizer.step()
    return model, optimizer


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("repair", ["bn", "least_squares", *REPAIRS])
def test_a_saved_plan_needs_data_and_then_does_the_same(repair: Any, tmp_path: Path) -> None:
    model = trained()
    plan = fxslim.plan_pruning(model, images()[0], repair=repair, data=BATCHES)
    plan.save(tmp_path / "plan.json")
    loaded = fxslim.load_plan(tmp_path / "plan.json")
    assert loaded.repair == plan.repair
    assert loaded.data is None
    wanted = plan.apply(copy.deepcopy(model))
    with pytest.raises(PlanError, match=r"has no data.*apply\(model, data=batches\), or apply\(model, values=False\)"):
        loaded.apply(copy.deepcopy(model))
    found = loaded.apply(copy.deepcopy(model), data=images(), forward=lambda model, batch: model(batch))
    same(found, wanted)
    assert error(found, model, images()) < error(
        dataclasses.replace(plan, repair=None).apply(trained()), model, images()
    )
    # Shapes only, for a state dict; the data that were known when planning are not read either.
    shape_only = plan.apply(copy.deepcopy(model), values=False)
    torch.testing.assert_close(
        shape_only[0].weight, dataclasses.replace(plan, repair=None).apply(copy.deepcopy(model))[0].weight
    )
    fxslim.save(wanted, tmp_path / "model.safetensors")
    same(fxslim.load(trained(), tmp_path / "model.safetensors"), wanted)


@pytest.mark.parametrize("repair", REPAIRS)
def test_an_error_in_the_data_leaves_model_and_optimizer(repair: Repair) -> None:
    model, optimizer = in_training()
    before = snapshot(model, optimizer)
    nan = images()[0].clone()
    nan[3] = torch.inf

    class Ending:
        def __iter__(self) -> Iterator[Tensor]:
            yield images()[0]
            raise OSError("the disk is gone")

    for data, kind, message in (
        ([images()[0], nan], CalibrationError, "reads NaN or infinity in batch 1 of data"),
        (Ending(), OSError, "the disk is gone"),
        ([], ConfigError, "data has no batches"),
        (images()[0], ConfigError, "not batches"),
        ([torch.ones(4, 3, 8, 8)], RuntimeError, "channels"),
    ):
        plan = fxslim.plan_pruning(model, images()[0], repair=repair, data=data)
        with pytest.raises(kind, match=message):
            plan.apply(model, optimizer=optimizer)
        assert_unchanged(before, snapshot(model, optimizer))


@pytest.mark.parametrize("repair", REPAIRS)
def test_an_interrupt_anywhere_in_the_repair_changes_nothing(repair: Repair) -> None:
    model, optimizer = in_training()
    plan = fxslim.plan_pruning(model, images()[0], repair=repair, data=images(2, 4))
    before, line = snapshot(model, optimizer), 5
    while Interrupter(line, KeyboardInterrupt).run(lambda: plan.apply(model, optimizer=optimizer)):
        assert_unchanged(before, snapshot(model, optimizer))
        line += 397
    assert line > 3000
    assert fxslim.applied(model)[0].cuts == plan.cuts


@pytest.mark.parametrize("repair", REPAIRS)
def test_training_goes_on_and_data_stay_out_of_the_model(repair: Repair) -> None:
    model, optimizer = in_training()
    parameters, modes = list(model.parameters()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    plan = fxslim.plan_pruning(model, images()[0], repair=repair, data=images())
    plan.apply(model, optimizer=optimizer)
    assert torch.equal(random, torch.get_rng_state())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    assert fxslim.applied(model)[0].data is None
    assert fxslim.applied(model)[0].repair == repair
    model(images()[0]).sum().backward()
    optimizer.step()


def test_verify_proves_the_cut_without_the_repair() -> None:
    model = trained()
    plan = fxslim.plan_pruning(model, images()[0], repair=REPAIRS[0], data=images())
    outcome = plan.verify(model, images()[1])
    assert outcome.ok
    assert any("compared without the plan's repair" in note for note in outcome.notes)
    plain = fxslim.plan_pruning(model, images()[0]).verify(model, images()[1])
    assert outcome.relative == plain.relative
    assert not any("repair" in note for note in plain.notes)


@pytest.mark.parametrize("repair", [Repair(steps=("least_squares",), inputs=inputs) for inputs in INPUTS])
def test_a_masked_model_has_nothing_to_mend(repair: Repair) -> None:
    model = trained().eval()
    plan = fxslim.plan_pruning(model, images()[0], repair=repair, data=images(3, 60))
    plan.mask(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        wanted = masked(images()[0])
        torch.testing.assert_close(plan.apply(model)(images()[0]), wanted, rtol=1e-4, atol=1e-5)


class Uncopied(nn.Module):
    """Holds what can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.held = trained(), (i for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_model_that_can_not_be_copied_is_fitted_to_the_original() -> None:
    plan = fxslim.plan_pruning(Uncopied(), images()[0], repair=REPAIRS[0], data=images())
    with pytest.raises(UnsupportedLayerError, match=r"can't be copied.*inputs='original'"):
        plan.apply(Uncopied())
    plan = dataclasses.replace(plan, repair=REPAIRS[1])
    plan.apply(Uncopied())


@pytest.mark.parametrize(
    "repair, message",
    [
        ("least_square", "repair: unknown step 'least_square'; did you mean 'least_squares'"),
        (["bn", "norms"], "unknown step 'norms'"),
        ((), "repair has no steps: name some of least_squares, bn"),
        (Repair(steps=("bn",), inputs="orignal"), "unknown inputs 'orignal'; did you mean 'original'"),
        (Repair(steps=("bn",), num_positions=0), "num_positions=0 must be an integer of at least 1"),
        (Repair(steps=("bn",), limit_bytes=0.5), "limit_bytes=0.5 must be an integer of at least 1"),
        (Repair(steps=("bn",), seed=True), "seed=True must be an integer of at least 0"),
    ],
)
def test_wrong_settings(repair: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fxslim.plan_pruning(trained(), images()[0], repair=repair, data=images())


def test_wrong_arguments_of_apply_and_damaged_plans() -> None:
    model = trained()
    plan = fxslim.plan_pruning(model, images()[0])
    with pytest.raises(PlanError, match="this plan has none: make it with repair='bn'"):
        plan.apply(model, data=images())
    repairing = fxslim.plan_pruning(model, images()[0], repair="bn")
    with pytest.raises(ConfigError, match="give data= with it"):
        repairing.apply(model, forward=lambda model, batch: model(batch))
    data = repairing.to_dict()
    for change in ({"steps": []}, {"steps": ["x"]}, {"more": 1}, {"limit_bytes": "many"}):
        with pytest.raises(CheckpointError, match=r"damaged.*repair"):
            fxslim.PruningPlan.from_dict(data | {"repair": data["repair"] | change})
