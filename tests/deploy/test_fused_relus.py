# SPDX-License-Identifier: Apache-2.0
"""Norms and ReLUs behind block-sparse layers become part of them where nothing else reads what is between."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fxslim
from fxslim.patterns import Block

BLOCK = Block(cin=4, cout=4, ratio=0.5)
ENDS = ("F.relu", "F.relu_", "module", "in place", "shared", "relu6", "none")
TAPS = ("", "", "after layer", "after norm", "after relu", "returned", "view")


class Step(nn.Module):
    """A convolution, perhaps a norm, an activation of some kind, and perhaps another reader of what is between."""

    def __init__(self, norm: bool, end: str, tap: str, shared: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else None
        self.end, self.tap, self.shared = end, tap, shared
        self.relu = nn.ReLU(inplace=end == "in place") if end in ("module", "in place") else None

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        y = self.conv(x)
        if self.tap == "after layer":
            kept.append(y * 2)
        if self.tap == "returned":
            kept.append(y)
        if self.norm is not None:
            y = self.norm(y)
        if self.tap == "after norm":
            kept.append(y.sigmoid())
        if self.tap == "view":
            kept.append(y[:, :3])
        y = self.activated(y)
        if self.tap == "after relu":
            # What is clamped already, once more.
            kept.append(F.relu(y) + x)
        return y

    def activated(self, y: Tensor) -> Tensor:
        known: dict[str, Any] = {
            "F.relu": F.relu, "F.relu_": F.relu_, "shared": self.shared, "relu6": F.relu6, "none": torch.neg,
        }  # fmt: skip
        return (self.relu or known[self.end])(y)


class Net(nn.Module):
    """Steps; sums go through the shared ReLU, too, where ``sums``."""

    def __init__(self, steps: list[tuple[bool, str, str]], sums: bool, in_place: bool) -> None:
        super().__init__()
        self.shared = nn.ReLU(inplace=in_place)
        self.steps = nn.ModuleList(Step(*step, self.shared) for step in steps)
        self.sums = sums

    def forward(self, x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        for step in self.steps:
            before = x
            x = step(x, kept)
            if self.sums:
                x = self.shared(x - before)
        return [x, *kept]


def settled(model: nn.Module) -> nn.Module:
    """Norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for state in (module.weight.data, module.running_mean, module.running_var):
                nn.init.uniform_(state, 0.5, 1.5)
    return model.eval()


def assert_same(model: nn.Module, converted: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for one, two in zip(tree_leaves(model(x.clone())), tree_leaves(converted(x.clone())), strict=True):
            assert (one - two).norm() <= 1e-5 * one.norm() + 1e-6


steps = st.lists(st.tuples(st.booleans(), st.sampled_from(ENDS), st.sampled_from(TAPS)), min_size=1, max_size=3)


@given(steps=steps, sums=st.booleans(), in_place=st.booleans(), seed=st.integers(0, 99))
def test_random_networks(steps: list[tuple[bool, str, str]], sums: bool, in_place: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = settled(Net(steps, sums, in_place))
    x = torch.randn(2, 8, 6, 6)
    fxslim.sparsify(model, BLOCK)
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=x, sparse=True)
    assert all(isinstance(step.conv, fxslim.nn.BlockSparseConv2d) for step in model.steps)
    assert_same(twin, model, torch.randn_like(x))
    # What may be fused is.
    for (_, end, tap), step in zip(steps, model.steps, strict=True):
        fits = end not in ("relu6", "none")
        if tap in ("", "after relu"):
            assert step.conv.has_relu == fits
            assert isinstance(step.norm, nn.Identity | None)
        if step.relu is not None:
            assert isinstance(step.relu, nn.Identity) == step.conv.has_relu


def converted(model: nn.Module, *inputs: Any, **settings: Any) -> nn.Module:
    fxslim.sparsify(model, BLOCK)
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=list(inputs), sparse=True, **settings)
    for x in inputs:
        if isinstance(x, Tensor):
            assert_same(twin, model, x)
    return model


def test_a_shared_relu_that_clamps_sums_besides_stays() -> None:
    model = converted(settled(Net([(True, "shared", "")] * 2, True, True)), torch.randn(1, 8, 6, 6))
    assert type(model.shared) is nn.ReLU
    assert all(step.conv.has_relu for step in model.steps)


def test_a_shared_relu_that_clamps_layers_alone_goes() -> None:
    model = converted(settled(Net([(True, "shared", "")] * 2, False, True)), torch.randn(1, 8, 6, 6))
    assert isinstance(model.shared, nn.Identity)


def test_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    x = torch.randn(3, 8)
    converted(model, x)
    assert [type(module).__name__ for module in model] == ["BlockSparseLinear", "Identity"] * 2
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    converted(model, torch.randn(2, 3, 8))
    assert model[0].has_relu


class Switched(nn.Module):
    """Clamps only bright pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(8, 8, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(y) if x.mean() > 0 else y


@pytest.mark.parametrize(("examples", "fused"), [((1.0,), True), ((-1.0,), False), ((1.0, -1.0), False)])
def test_examples_must_agree(examples: tuple[float, ...], fused: bool) -> None:
    model = converted(Switched(), *(torch.full((1, 8, 6, 6), value) for value in examples))
    assert model.conv.has_relu == fused
    assert isinstance(model.relu, nn.Identity) == fused


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(F.relu(self.conv(x)))) + self.norm(x)

    model = converted(settled(Twice()), torch.randn(1, 8, 6, 6))
    assert model.conv.has_relu
    assert type(model.norm) is nn.BatchNorm2d


def test_two_readers_of_one_result_get_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            one, two = self.one(y), self.two(y)
            return one.add_(1) * two

    model = converted(Two(), torch.randn(1, 8, 6, 6))
    assert model.conv.has_relu
    assert type(model.one) is nn.ReLU


def test_hooks_of_users_stay_and_see_what_is_clamped() -> None:
    model, seen = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(1, 8, 6, 6)
    converted(model, x)
    seen.clear()
    y = model(x)
    assert torch.equal(seen[0] + 1, y)
    assert (seen[0] >= 0).all()


def test_a_hook_that_computes_with_what_is_not_clamped_keeps_it() -> None:
    model, seen = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    assert not converted(model, torch.randn(1, 8, 6, 6))[0].has_relu


def test_a_hook_that_changes_the_result_keeps_the_relu_behind() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output - 1)
    converted(settled(model), torch.randn(1, 8, 6, 6))
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[0].has_relu


def test_without_inputs_nothing_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fxslim.convert(fxslim.sparsify(model, BLOCK), sparse=True)
    assert [type(module).__name__ for module in model] == ["BlockSparseConv2d", "BatchNorm2d", "ReLU"]


def test_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 8, 8)
    model = settled(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()))
    fxslim.quantize(fxslim.sparsify(model, BLOCK), "int8", data=[x], target="tensorrt", calibration="min_max")
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=x, sparse=True)
    assert [one.kernel for one in plan.layers] == ["block-sparse int8, 18 of 36 blocks"] * 2
    plan.apply(model)
    assert [type(module).__name__ for module in model] == [
        "Int8BlockSparseConv2d", "Identity", "Identity", "Int8BlockSparseConv2d", "Identity",
    ]  # fmt: skip
    with torch.no_grad():
        expected = twin(x)
        assert (model(x) - expected).norm() <= 1e-3 * expected.norm()
