# SPDX-License-Identifier: Apache-2.0
"""Pruning in the middle of training: optimizers go on as if they had always trained the kept entries; old losses."""

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import ConfigError, PlanError, UnsupportedLayerError
from fxslim.graph.surgery.cutting import cut_tensor
from tests.graph.random_networks import RandomNetwork
from tests.pruning.small_models import X, assert_unchanged, small, snapshot

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, capturable=False),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw fused amsgrad": lambda p: torch.optim.AdamW(p, 0.01, fused=True, amsgrad=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, t0=1),
}


def cuts_of(plan: fxslim.PruningPlan) -> dict[str, list]:
    found: dict[str, list] = {}
    for cut in plan.cuts:
        found.setdefault(cut.name, []).append(cut)
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_that_of_an_optimizer_that_always_trained_the_kept_entries(kind: str) -> None:
    model = small().double()
    x = X.double()
    plan = fxslim.plan_pruning(model, x, importance="random")
    cuts = cuts_of(plan)

    def sliced(name: str, value: Tensor) -> Tensor:
        return cut_tensor(value, cuts.get(name, [])).clone()

    reference = {name: nn.Parameter(sliced(name, p)) for name, p in model.named_parameters()}
    optimizer, other = (OPTIMIZERS[kind](list(p)) for p in (model.parameters(), reference.values()))
    for step in range(8):
        if step == 4:
            plan.apply(model, optimizer=optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for name, parameter in model.named_parameters():
            reference[name].grad = sliced(name, parameter.grad) if step < 4 else parameter.grad.clone()
        optimizer.step()
        other.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference[name], rtol=1e-12, atol=1e-14)


def test_parameters_stay_the_same_objects_and_the_loss_goes_down() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    parameters = list(model.parameters())
    fxslim.prune(model, X, optimizer=optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_cut_alike_so_accumulation_goes_on(seed: int) -> None:
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = RandomNetwork(seed).double().eval()
    model(x).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    plan = fxslim.plan_pruning(model, x, ratio=0.2, target="params", importance="random", seed=seed)
    plan.apply(model)
    cuts = cuts_of(plan)
    kept = {name: cut_tensor(grad, cuts.get(name, [])) for name, grad in before.items()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in kept)
        assert name not in kept or torch.equal(parameter.grad, kept[name])
    model(y).square().sum().backward()
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(accumulated[name], kept.get(name, 0) + parameter.grad)


def all_grads_fit(model: nn.Module) -> bool:
    return all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("frozen", ["", "0", "all but norms"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_an_old_loss_is_a_clear_error_and_new_ones_work(seed: int, training: bool, frozen: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = RandomNetwork(seed).train(training)
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("layers.l0.") if frozen == "0" else parameter.dim() > 1 and bool(frozen)
        parameter.requires_grad_(not is_frozen)
    old_loss = model(x).square().sum()
    plan = fxslim.plan_pruning(model, x, ratio=0.2, target="params", importance="random", seed=seed)
    cut = {c.name for c in plan.cuts}
    trained = [p for name, p in model.named_parameters() if name in cut and p.requires_grad]
    grads = torch.autograd.grad(old_loss, trained, allow_unused=True, retain_graph=True) if trained else ()
    plan.apply(model)
    if any(grad is not None for grad in grads):
        with pytest.raises((PlanError, RuntimeError), match=r"was cut after this loss|modified by an inplace"):
            old_loss.backward()
    assert all_grads_fit(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert all_grads_fit(model)
    assert any(p.grad is not None for p in model.parameters())


def test_an_old_loss_whose_values_are_free_of_weights_names_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    old_penalty = model[0].bias.sum()
    fxslim.prune(model, torch.randn(3, 4))
    with pytest.raises(PlanError, match=r"0\.bias was cut after this loss.*zero_grad"):
        old_penalty.backward()
    assert model[0].bias.grad is None


def test_planning_leaves_old_losses_alone() -> None:
    for training in (False, True):
        model = small().train(training)
        old_loss = model(X).square().sum()
        fxslim.plan_pruning(model, X).verify(model, X)
        old_loss.backward()


def test_a_gradient_scaler_goes_on() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(X).square().mean()
        scaler.scale(loss).backward()
        if step == 1:
            scaler.unscale_(optimizer)
            fxslim.prune(model, X, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16.0
    assert model[0].out_channels < 16
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_planning_under_autocast_is_planning_without() -> None:
    plain = fxslim.plan_pruning(small(), X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = fxslim.plan_pruning(small(), X)
        assert plan.verify(small(), X).ok
        plan.apply(small())
    assert plan.to_dict() == plain.to_dict()


def test_parameter_groups_and_parameters_outside_of_the_optimizer() -> None:
    model = small()
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": model[3].parameters()}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    fxslim.prune(model, X, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert len(optimizer.state) == 2
    for parameter, kept in optimizer.state.items():
        assert kept["momentum_buffer"].shape == parameter.shape
    model(X).sum().backward()
    optimizer.step()


def refused(model: nn.Module, optimizer: torch.optim.Optimizer, error: type, message: str) -> None:
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        fxslim.prune(model, X, optimizer=optimizer)
    assert_unchanged(before, snapshot(model, optimizer))


def test_the_optimizer_of_another_model_is_refused_by_name() -> None:
    other = torch.optim.Adam(small().parameters())
    refused(small(), other, ConfigError, "this Adam holds 9 parameters and none of this model's")


def test_state_of_another_shape_is_refused_by_name() -> None:
    model = small()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    refused(model, optimizer, UnsupportedLayerError, r"Adafactor keeps .* for 0\.weight.*make the optimizer after")
    quasi_newton = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        quasi_newton.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    quasi_newton.step(closure)
    refused(model, quasi_newton, UnsupportedLayerError, r"LBFGS keeps .* for 0\.weight.*make the optimizer after")


def test_optimizers_that_keep_nothing_yet_are_welcome() -> None:
    for kind in (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Adam):
        model = small()
        optimizer = kind(model.parameters(), lr=0.01)
        fxslim.prune(model, X, optimizer=optimizer)

        def closure(model=model, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def test_sparse_gradients_of_embeddings() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(20, 16, sparse=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.fc(self.words(x).mean(1))

    model, x = Words(), torch.randint(0, 20, (4, 6))
    model(x).sum().backward()
    before = model.words.weight.grad.to_dense()
    plan = fxslim.plan_pruning(model, x, target="channels")
    plan.apply(model)
    assert torch.equal(model.words.weight.grad.to_dense(), cut_tensor(before, cuts_of(plan)["words.weight"]))
    model(x).sum().backward()
