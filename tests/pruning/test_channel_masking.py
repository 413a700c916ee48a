# SPDX-License-Identifier: Apache-2.0
"""plan.mask: the masked model is the pruned model, in eval and in training; masks come, stay and go."""

import copy
import io

import pytest
import torch
from torch import nn

import fxslim
from fxslim import PlanError, UnsupportedLayerError
from fxslim.pruning.removals import removed_entries
from tests.graph.random_networks import RandomNetwork, randomise
from tests.pruning.small_models import assert_unchanged, small, snapshot
from tests.pruning.test_atomic_apply import HiddenSize

X = torch.randn(2, 3, 16, 16)

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.05),
    # A large eps: dividing by tiny gradients would amplify the rounding of the last bit.
    lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.01, eps=1e-4),
    lambda p: torch.optim.AdamW(p, 1e-3, eps=1e-4),
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-300)) if b.numel() else 0.0


def removed_values(plan: fxslim.PruningPlan, states: dict[str, torch.Tensor]) -> torch.Tensor:
    """All values that the plan removes, of those states that are given."""
    cuts = [cut for cut in plan.cuts if cut.name in states]
    parts = [states[c.name].masked_select(removed_entries(c, tuple(states[c.name].shape))) for c in cuts]
    return torch.cat([part.detach().double() for part in parts] or [torch.zeros(0)])


def small_plan(model: nn.Module) -> fxslim.PruningPlan:
    return fxslim.plan_pruning(model, X, ratio=0.4)


@pytest.mark.parametrize("kind", range(3))
def test_random_networks_train_masked_as_they_train_pruned(kind: int) -> None:
    tried = 0
    for seed in range(kind, 90, 3):
        model, x = RandomNetwork(seed).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
        try:
            plan = fxslim.plan_pruning(model, x, ratio=0.35, importance="random", seed=seed)
        except PlanError:
            continue
        optimizer = OPTIMIZERS[kind](model.parameters())
        # Momentum from before the mask.
        train(model, optimizer, batches[:2])
        pruned = copy.deepcopy(model)
        other = OPTIMIZERS[kind](pruned.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        plan.apply(pruned, optimizer=other)
        plan.mask(model, optimizer=optimizer)
        assert relative(model.eval()(x), pruned.eval()(x)) <= 1e-9, seed
        train(model, optimizer, batches)
        train(pruned, other, batches)
        parameters = dict(model.named_parameters())
        assert not removed_values(plan, parameters).any(), f"seed {seed}: a step moved masked entries"
        assert not removed_values(plan, {n: p.grad for n, p in parameters.items() if p.grad is not None}).any()
        assert relative(model.eval()(x), pruned.eval()(x)) <= 1e-9, seed
        plan.apply(model, optimizer=optimizer)
        for (name, a), b in zip(model.state_dict().items(), pruned.state_dict().values(), strict=True):
            assert relative(a.double(), b.double()) <= 1e-9, f"seed {seed}: {name}"
        tried += 1
    assert tried >= 25


def test_without_the_optimizer_entries_are_zero_again_at_the_next_forward_and_in_the_state() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, [X])
    plan = small_plan(model)
    plan.mask(model)
    train(model, optimizer, [X])
    assert removed_values(plan, dict(model.named_parameters())).any(), "the test has no power"
    assert not removed_values(plan, model.state_dict()).any()
    train(model, optimizer, [X])
    model(X)
    assert not removed_values(plan, dict(model.named_parameters())).any()


def test_no_gradient_where_zero_does_not_stay_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3))
    plan = small_plan(model)
    plan.mask(model)
    model(X).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not removed_values(plan, gradients).any()
    assert gradients["2.weight"].any()


def test_names_objects_class_and_modes_stay() -> None:
    model = small()
    before, kind = snapshot(model), type(model)
    names = list(model.state_dict())
    plan = small_plan(model)
    assert plan.mask(model) is model
    after = snapshot(model)
    assert (after["identity"], after["attributes"]) == (before["identity"], before["attributes"])
    assert list(model.state_dict()) == names
    assert type(model) is kind
    assert not removed_values(plan, model.state_dict()).any()


def test_a_state_dict_goes_through_a_file_into_a_masked_model() -> None:
    model = small()
    plan = small_plan(model)
    plan.mask(model)
    train(model, torch.optim.SGD(model.parameters(), 0.01), [X])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = small()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plan.mask(fresh).eval()(X), model.eval()(X))
    # Unmasked weights put into a masked model are masked.
    model.load_state_dict(small().state_dict())
    assert torch.equal(model.eval()(X), plan.mask(small()).eval()(X))


def test_a_copy_is_masked_by_itself() -> None:
    model = small()
    plan = small_plan(model)
    plan.mask(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, weight_decay=0.1)
    train(twin, optimizer, [X, X])
    assert not removed_values(plan, dict(twin.named_parameters())).any()
    assert not removed_values(plan, {n: p.grad for n, p in twin.named_parameters()}).any()
    plan.unmask(twin)
    with torch.no_grad():
        for parameter in [*twin.parameters(), *model.parameters()]:
            parameter.fill_(1.0)
    assert (twin[0].weight == 1).all()
    model(X)
    assert not removed_values(plan, dict(model.named_parameters())).any()


def test_unmasked_entries_train_again() -> None:
    model = small()
    plan = small_plan(model)
    plan.unmask(plan.mask(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    train(model, torch.optim.SGD([torch.nn.init.ones_(p) for p in model.parameters()], 0.1), [X])
    assert removed_values(plan, model.state_dict()).all()


def test_masking_twice_is_masking_once() -> None:
    model, once = small(), small()
    plan = small_plan(model)
    plan.mask(once)
    plan.mask(plan.mask(model))
    assert len(model._forward_pre_hooks) == 1
    assert torch.equal(model.eval()(X), once.eval()(X))
    plan.unmask(model)
    assert not model._forward_pre_hooks


class LayerNorms(nn.Module):
    """Norms over channels, one of them through the function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.broken = False
        self.norm, self.scale = nn.LayerNorm(12), nn.Parameter(torch.rand(12))

    def forward(self, x):
        h = torch.sigmoid(self.norm(self.a(x)))
        h = nn.functional.layer_norm(self.b(h), self.scale.shape, self.scale)
        if self.broken:
            raise RuntimeError("broken")
        return self.c(h)


def test_norms_average_over_the_kept_channels() -> None:
    model, x = randomise(LayerNorms()).double(), torch.randn(4, 6, dtype=torch.float64)
    plan = fxslim.plan_pruning(model, x, ratio=0.4)
    pruned = plan.apply(copy.deepcopy(model))
    plan.mask(model)
    assert relative(model(x), pruned(x)) <= 1e-12
    train(model, torch.optim.SGD(model.parameters(), 0.1), [x] * 3)
    train(pruned, torch.optim.SGD(pruned.parameters(), 0.1), [x] * 3)
    assert relative(model(x), pruned(x)) <= 1e-12
    # A forward that fails leaves no norms behind.
    model.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        model(x)
    y = torch.randn(2, 12, dtype=torch.float64)
    wide = nn.functional.layer_norm(y, (12,), model.scale)
    assert relative(wide, nn.functional.layer_norm(y, (12,)) * model.scale) <= 1e-12


def test_two_forwards_before_one_backward() -> None:
    model = small()
    plan = small_plan(model)
    plan.mask(model)
    (model(X).sum() + model(X + 1).sum()).backward()
    with torch.no_grad():
        loss = model(X)
    assert not loss.requires_grad
    assert not removed_values(plan, {n: p.grad for n, p in model.named_parameters()}).any()


def test_frozen_parameters_are_masked_too() -> None:
    model = small().requires_grad_(False)
    plan = small_plan(model)
    plan.mask(model)
    model.requires_grad_(True)
    train(model, torch.optim.SGD(model.parameters(), 0.1), [X])
    assert not removed_values(plan, dict(model.named_parameters())).any()


def test_compiled() -> None:
    model = small()
    plan = small_plan(model)
    plan.mask(model)
    compiled = torch.compile(model, backend="eager")
    want = plan.apply(small()).eval()(X)
    torch.testing.assert_close(compiled.eval()(X), want, rtol=1e-5, atol=1e-5)


def test_applying_a_masked_model_takes_the_mask_along() -> None:
    model = small()
    plan = small_plan(model)
    want = plan.apply(small())
    plan.mask(model)
    assert torch.equal(plan.apply(model).eval()(X), want.eval()(X))
    assert not model._forward_pre_hooks
    with pytest.raises(PlanError, match="does not fit"):
        plan.apply(model)
    with pytest.raises(PlanError, match="does not fit"):
        plan.mask(model)


def test_a_failed_apply_leaves_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HiddenSize()
    plan = fxslim.plan_pruning(model, X)
    plan.mask(model)
    before = snapshot(model)
    with pytest.raises(PlanError, match="made for 8 channels"):
        plan.apply(model)
    assert_unchanged(before, snapshot(model))
    with torch.no_grad():
        model.conv.weight.fill_(1.0)
    model(X)
    assert not removed_values(plan, dict(model.named_parameters())).any()


def test_planning_and_proof_see_through_masks() -> None:
    model = small()
    plan = small_plan(model)
    report = fxslim.trace(model, X).report()
    plan.mask(model)
    assert fxslim.trace(model, X).report() == report
    proof = plan.verify(model, X)
    assert proof.relative <= 1e-9
    # Masked entries are 0 already: their removal shows nothing, and the proof says so.
    assert "VACUOUS" in str(proof)


def test_what_does_not_fit_is_refused() -> None:
    model = small()
    plan, other = small_plan(model), fxslim.plan_pruning(model, X, ratio=0.2)
    with pytest.raises(PlanError, match=r"the model is not masked: call plan.mask\(model\) first"):
        plan.unmask(model)
    plan.mask(model)
    for use in (other.mask, other.apply, other.unmask):
        with pytest.raises(PlanError, match="masked by another plan"):
            use(model)
    with pytest.raises(PlanError, match=r"does not fit this model: it has no 0\.weight"):
        plan.mask(nn.Linear(2, 2))
    with pytest.raises(UnsupportedLayerError, match="DataParallel: apply before wrapping"):
        plan.mask(nn.DataParallel(small()))
