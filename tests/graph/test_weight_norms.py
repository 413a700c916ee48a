# SPDX-License-Identifier: Apache-2.0
"""Weight norm, over any dims: channels go, what is left of the weight is what it was, and it trains as before."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxslim
from fxslim.graph.recording import named_states
from fxslim.pruning import pruning_plan
from fxslim.pruning.channel_masking import unmasked_copy
from tests.graph.proofs import check_family, picture, stays


def hooked(layer: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, "weight", dim)


def parametrized(layer: nn.Module, dim: int | None) -> nn.Module:
    return parametrizations.weight_norm(layer, "weight", dim)


KINDS = {"hooked": hooked, "parametrized": parametrized}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), "0 2"),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), "0 2"),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), "0"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, padding=1), "0 2"),
    "linear": (lambda: nn.Linear(8, 16), "0 2"),
}
everywhere = pytest.mark.parametrize("kind", KINDS)


def network(layer: nn.Module) -> tuple[nn.Sequential, Tensor]:
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), layer, nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 3)
    ends = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)
    return nn.Sequential(ends[0], nn.Tanh(), layer, nn.ReLU(), ends[1]), picture()


def case(kind: str, dim: int | None, layer: str = "convolution") -> tuple[nn.Sequential, Tensor, fxslim.PruningPlan]:
    torch.manual_seed(0)
    model, x = network(KINDS[kind](LAYERS[layer][0](), dim))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.eval()(x)
    return model, x, fxslim.plan_pruning(model, x, ratio=0.5, target="channels", importance="random")


def kept(plan: fxslim.PruningPlan, model: nn.Sequential) -> Tensor:
    """The weight that the pruned layer should compute: a part of the whole one."""
    with torch.no_grad():
        model(torch.zeros(1, 3, *(() if isinstance(model[2], nn.Linear) else (8, 8))))
    weight = model[2].weight.detach()
    for cut in plan.cuts:
        if cut.name.startswith("2.") and cut.name.endswith(("weight_v", "original1")):
            weight = weight.index_select(cut.dim, torch.tensor(cut.keep))
    return weight


@everywhere
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("name", LAYERS)
def test_families(kind: str, dim: int | None, name: str) -> None:
    build, prunes = LAYERS[name]
    if (name, dim) in {("grouped", 1), ("linear", 2)}:
        pytest.skip("one gain for inputs of all groups, which stay; a matrix has two dims")
    model, x = network(KINDS[kind](build(), dim))
    kinds = [type(module) for module in model]
    check_family(model, x, prunes=prunes)
    assert [type(module) for module in model] == kinds


@everywhere
def test_one_gain_for_inputs_of_all_groups(kind: str) -> None:
    model, x = network(KINDS[kind](LAYERS["grouped"][0](), 1))
    stays(model, x, "0", "has one entry for inputs of all groups")


@everywhere
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_the_rest_of_the_weight_stays(kind: str, dim: int | None) -> None:
    model, x, plan = case(kind, dim)
    expected, before = kept(plan, model), dict(model.named_parameters())
    trained = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    trained.step()
    trained.zero_grad()
    expected = kept(plan, model)
    plan.apply(model, optimizer=trained)
    assert model[2].weight.shape == expected.shape
    model(x)
    assert torch.allclose(model[2].weight, expected, rtol=1e-5)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    model(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model[2].parameters())
    trained.step()
    model(x)
    assert not torch.allclose(model[2].weight, expected, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("left", [0.0, 1e-30])
def test_nothing_or_little_is_left_of_a_norm(kind: str, left: float) -> None:
    """A direction of 0 has no norm, and one of 1e-30 none in float32."""
    model, x, plan = case(kind, 0)
    direction = next(p for name, p in model[2].named_parameters() if name.endswith(("weight_v", "original1")))
    inputs = next(cut.keep for cut in plan.cuts if cut.name.startswith("2.") and cut.role == "consumer")
    with torch.no_grad():
        direction[:, list(inputs)] = left
    expected = kept(plan, model)
    assert plan.verify(model, x).relative <= 1e-9
    plan.apply(model)(x)
    assert torch.allclose(model[2].weight, expected, rtol=1e-5, atol=0)


@everywhere
@pytest.mark.parametrize("dim", [0, 1, None])
def test_masked_then_removed(kind: str, dim: int | None) -> None:
    model, x, plan = case(kind, dim)
    pruned = plan.apply(unmasked_copy(model))
    plan.mask(model)
    assert torch.allclose(model(x), pruned(x), rtol=1e-4, atol=1e-5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(3):
        sgd.zero_grad()
        model(x).square().mean().backward()
        sgd.step()
    trained = model(x)
    assert torch.allclose(plan.apply(model)(x), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, pruned(x), rtol=1e-2, atol=1e-2)


@everywhere
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    model, x, plan = case(kind, 2)
    plan.apply(model)
    fxslim.save(model, tmp_path / "model.safetensors")
    again = fxslim.load(case(kind, 2)[0], tmp_path / "model.safetensors")
    assert torch.equal(again.eval()(x), model(x))


@everywhere
def test_a_failure_leaves_everything(kind: str, monkeypatch) -> None:
    model, _, plan = case(kind, None)
    before = {name: state.clone() for name, state in named_states(model)}
    weight = model[2].weight.detach().clone()

    def fails(*_: object) -> None:
        raise RuntimeError("now")

    monkeypatch.setattr(pruning_plan, "remember_plan", fails)
    with pytest.raises(RuntimeError, match="now"):
        plan.apply(model)
    assert all(torch.equal(state, before[name]) for name, state in named_states(model))
    assert torch.equal(model[2].weight, weight)


@everywhere
def test_wrong_gains_are_seen(kind: str, monkeypatch) -> None:
    """The twin has weights of its own: without new gains the pruned model is not equal to it."""
    model, x, plan = case(kind, None)
    assert plan.verify(model, x).ok
    monkeypatch.setattr(pruning_plan, "kept_norms", lambda norms, states, silent, values: dict(values))
    assert plan.verify(model, x).relative > 1e-3


@pytest.mark.parametrize("besides", ["original0", "original1"])
def test_parameters_that_are_used_besides(besides: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), parametrized(nn.Linear(8, 16), 0)
            self.c, self.d = nn.Linear(16, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.d(torch.tanh(self.c(self.b(self.a(x))))) * getattr(self.b.parametrizations.weight, besides).sum()
            )

    stays(
        Net(), torch.randn(5, 3), "b", f"uses b.parametrizations.weight.{besides} besides the weight that is made of it"
    )


def test_two_weights_of_one_gain_stay() -> None:
    model, x = network(parametrized(nn.Linear(8, 16), 0))
    model[4] = parametrized(nn.Linear(16, 16), 0)
    model.append(nn.Linear(16, 4))
    model[4].parametrizations.weight.original0 = model[2].parametrizations.weight.original0
    stays(model, x, "2", "is made by _WeightNorm: call torch.nn.utils.parametrize")


@everywhere
def test_least_squares_leaves_it_and_says_so(kind: str) -> None:
    model, x, _ = case(kind, 0)
    data = [(torch.randn(64, *x.shape[1:]), torch.zeros(64, dtype=torch.long))]
    settings = {"ratio": 0.5, "target": "channels", "importance": "random"}
    plan = fxslim.plan_pruning(model, x, **settings, data=data, repair="least_squares")
    direction = next(name for name, p in model[2].named_parameters() if name.endswith(("weight_v", "original1")))
    note = f"repair: 2: its weight is computed from {direction.rpartition('.')[2]}"
    assert note in plan.notes
    assert plan.apply(model)(x).isfinite().all()
