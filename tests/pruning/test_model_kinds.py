# SPDX-License-Identifier: Apache-2.0
"""Models as people have them: compiled, averaged, frozen, in half precision, on meta, with hooks, with heads beside."""

import copy
import threading

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxslim
from fxslim import ConfigError, UnsupportedLayerError
from tests.graph.random_networks import RandomNetwork, randomise
from tests.pruning.small_models import X, assert_unchanged, small, snapshot


def pruned_and_proved(model: nn.Module, x: torch.Tensor = X, visible: bool = True, **settings) -> fxslim.PruningPlan:
    """Plan, prove, apply, and run in both modes."""
    plan = fxslim.plan_pruning(model, x, **settings)
    proof = plan.verify(model, x)
    assert proof.ok or not visible, proof
    assert proof.relative <= 1e-9
    assert plan.apply(model) is model
    for training in (False, True):
        model.train(training)(x)
    return plan


class WithSizes(nn.Module):
    """Reads a size from an item of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (0, 16)
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)).view(-1, self.sizes[1]))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("seed", range(10))
def test_plans_compose(seed: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    model, fresh = RandomNetwork(seed), RandomNetwork(seed)
    plans = [pruned_and_proved(model, x, visible=False, ratio=0.2, importance="random", seed=i) for i in range(3)]
    assert fxslim.applied(model) == plans
    for plan in plans:
        plan.apply(fresh)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_an_average_of_weights_is_pruned_by_the_same_plan() -> None:
    model = small()
    average, twin = AveragedModel(model), copy.deepcopy(model)
    plan = pruned_and_proved(model)
    plan.apply(average.module)
    plan.apply(twin)
    assert torch.equal(average.eval()(X), twin.eval()(X))
    average.update_parameters(model)
    assert fxslim.applied(average.module) == [plan]
    with_sizes = WithSizes()
    plan = fxslim.plan_pruning(with_sizes, X)
    assert [str(new.attribute) for new in plan.new_sizes] == ["sizes[1]"]
    pruned_and_proved(AveragedModel(with_sizes))
    wrapped = AveragedModel(with_sizes)
    plan.apply(wrapped.module)(X)
    plan.apply(Wrapper(with_sizes))(X)
    assert wrapped.module.sizes[1] == with_sizes.sizes[1] < 16
    later = AveragedModel(model)
    later.update_parameters(model)
    pruned_and_proved(later)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_recompile(backend: str) -> None:
    model = small().eval()
    compiled = torch.compile(model, backend=backend)
    before = compiled(X)
    plan = fxslim.plan_pruning(compiled, X)
    assert plan.verify(compiled, X).ok
    assert torch.equal(compiled(X), before)
    assert plan.apply(compiled) is compiled
    assert fxslim.applied(model) == fxslim.applied(compiled) == [plan]
    torch.testing.assert_close(compiled(X), model(X))
    assert not torch.allclose(compiled(X), before)
    compiled.train()(X).sum().backward()
    fresh = small().eval()
    plan.apply(fresh)
    torch.testing.assert_close(fresh(X).shape, model(X).shape)


def test_modules_compiled_inside_of_a_model(tmp_path) -> None:
    model = small().eval()
    model[3].compile(backend="eager")
    model[0] = torch.compile(model[0], backend="eager")
    model(X)
    plan = pruned_and_proved(model)
    assert {cut.name for cut in plan.cuts} >= {"0._orig_mod.weight", "3.weight"}
    fxslim.save(torch.compile(model, backend="eager"), tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    pruned_and_proved(model, X.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}


class Casting(nn.Module):
    """Its forward asks for floats of its own choice everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = small()[:3], small()[3:]

    def forward(self, x):
        x = self.first(x.float()).half().to(torch.float32)
        x = x + torch.zeros(1, dtype=torch.float32) + torch.ones(1)
        x = x * torch.softmax(x.mean((2, 3), keepdim=True), 0, dtype=torch.float32).type_as(x)
        return self.last(x.float()).float()


def test_casts_inside_of_the_forward() -> None:
    pruned_and_proved(Casting())


def test_autocast_inside_of_the_forward_is_proved_or_frozen() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = small()[:3], small()[3:]

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.first(x)
            return self.last(x.float())

    pruned_and_proved(Mixed(), ratio=0.2)


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = small(), torch.randn(2, 3, 16, 16)
    before = [(n, p.shape) for n, p in model.named_parameters()]
    with pytest.raises(ConfigError, match=r"0\.weight is on the meta device: use importance='random'"):
        fxslim.plan_pruning(model, x)
    plan = fxslim.plan_pruning(model, x, importance="random")
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight is on the meta device and has none"):
        plan.verify(model, x)
    assert [(n, p.shape) for n, p in model.named_parameters()] == before
    plan.apply(model)
    real = small()
    plan.apply(real)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(model.eval()(X), real.eval()(X))


def test_applying_under_inference_mode() -> None:
    model = small()
    with torch.inference_mode():
        plan = fxslim.plan_pruning(model, X.clone())
        assert plan.verify(model, X.clone()).ok
        plan.apply(model)
    assert not any(p.is_inference() for p in model.parameters())
    model(X).sum().backward()


@pytest.mark.parametrize("frozen", [["0", "1"], ["3"], ["0", "1", "3", "4", "8"]])
def test_frozen_parts_are_pruned_and_stay_frozen(frozen: list[str]) -> None:
    model = small()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    plan = pruned_and_proved(model)
    assert {"0.weight", "3.weight"} <= {cut.name for cut in plan.cuts}
    assert [p.requires_grad for p in model.parameters()] == flags
    if any(flags):
        model(X).sum().backward()
    assert [p.grad is not None for p in model.parameters()] == flags


class Stateful(nn.Module):
    """Changes buffers, numbers, lists and private attributes in its forward, returns no plain tensor, has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self._steps, self.history, self.last = small(), 0, [], None
        self.register_buffer("mean", torch.zeros(5))
        self.outputs: dict[str, int] = {}
        self.body[3].register_forward_hook(lambda module, args, out: out * 2)
        self.body[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.body[3].weight.register_hook(lambda grad: grad * 0.5)

    def forward(self, x):
        self._steps += 1
        out = self.body(x)
        self.mean.mul_(0.9).add_(out.detach().mean(0))
        self.history.append(len(x))
        self.outputs["seen"] = self._steps
        self.last = out
        return {"logits": out, "name": "small", "sizes": (len(x), None), "step": self._steps}


def test_state_hooks_and_odd_outputs() -> None:
    model = Stateful()
    model(X)
    before = snapshot(model)
    plan = fxslim.plan_pruning(model, X)
    assert plan.verify(model, X).ok
    assert_unchanged(before, snapshot(model))
    plan.apply(model)
    assert (model._steps, model.history, model.outputs) == (1, [2], {"seen": 1})
    model(X)["logits"].sum().backward()
    assert model._steps == 2


def test_what_can_not_be_copied_is_named() -> None:
    model = small()
    model[0].lock = threading.Lock()
    plan = fxslim.plan_pruning(model, X)
    with pytest.raises(
        UnsupportedLayerError, match=r"0\.lock can't be copied: TypeError.*apply the plan without verify"
    ):
        plan.verify(model, X)
    plan.apply(model)


def test_computed_tensors_kept_as_attributes() -> None:
    model = small()
    model.kept, model.more = model[0].weight * 2, {"list": [model[3].weight.sum()]}
    pruned_and_proved(model)


@pytest.mark.parametrize("name, size", [("googlenet", 96), ("inception_v3", 299)])
def test_auxiliary_heads_run_in_both_modes(name: str, size: int) -> None:
    model = randomise(torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True))
    x = torch.randn(2, 3, size, size)
    plan = fxslim.plan_pruning(model, x, ratio=0.5, importance="random")
    assert any("aux" in cut.name.lower() for cut in plan.cuts)
    assert plan.verify(model, x).ok
    plan.apply(model)
    model.eval()(x)
    outputs = model.train()(x)
    sum(output.sum() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_layers_that_no_gradient_reaches() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
            self.unused = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x)
            return self.fc((h.detach() + self.b(x)).mean((2, 3)))

    model = Detached()
    plan = pruned_and_proved(model, target="channels")
    assert model.a.out_channels == model.b.out_channels == 4
    assert model.unused.weight.shape == (8, 8, 3, 3)
    assert "note: unused.weight was not reached" in str(plan)
