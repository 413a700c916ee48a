# SPDX-License-Identifier: Apache-2.0
"""Refitted weights are those of torch.linalg.lstsq, for every kind of layer, and leave a smaller error than before."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.pruning.repair.settings import INPUTS
from tests.pruning.repair.oracles import IMAGES, best_fit, deep, error, least_squares, pruned, read_and_returned

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def assert_best(layer: nn.Module, x: Tensor, wanted: Tensor) -> None:
    """The layer has the weights that lstsq finds for what it reads and should return."""
    weight, bias = best_fit(layer, x, wanted)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=1e-8)
    if bias is not None:
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-6, atol=1e-8)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A layer with correlated outputs, a convolution that reads them, and the shape of an input."""
    rank, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    kernel = [draw(st.integers(1, 2 if rank == 3 else 3)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding: Any = [draw(st.integers(0, 2)) for _ in range(rank)]
    stride = [draw(st.integers(1, 3)) for _ in range(rank)]
    if draw(st.booleans()):
        padding, stride = draw(st.sampled_from(["same", "valid"])), [1] * rank
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    size = [draw(st.integers(3, 4)) + r for r in reach]
    layer = CONVOLUTIONS[rank]
    first = layer(3, 4 * groups, 1)
    second = layer(
        4 * groups, 2 * groups, kernel, stride, padding, dilation, groups, draw(st.booleans()), padding_mode=mode
    )
    return first, second, (64, 3, *size)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions(), st.sampled_from(INPUTS), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_a_convolution_is_the_best_one(layers: Any, inputs: str, seed: int) -> None:
    torch.manual_seed(seed)
    first, second, shape = layers
    model = nn.Sequential(first, nn.Softplus(), second).double()
    batches = [torch.randn(shape).double() for _ in range(2)]
    # Planning sees no channels through circular padding; the plan of a layer without fits.
    planned = copy.deepcopy(model)
    planned[2].padding_mode = "zeros"
    plan = fxslim.plan_pruning(planned, batches[0], target="channels", repair=least_squares(inputs))
    plain = dataclasses.replace(plan, repair=None).apply(copy.deepcopy(model))
    repaired = plan.apply(copy.deepcopy(model), data=batches)
    assert repaired[2].weight.shape[1] < model[2].weight.shape[1]
    assert error(repaired, model, batches) < error(plain, model, batches)
    x, _ = read_and_returned(repaired, "2", batches)
    _, wanted = read_and_returned(model, "2", batches)
    assert_best(repaired[2], x, wanted)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 6), (5, 8, 6), (2, 3, 8, 6)])
def test_linear_on_tokens_is_the_best_one(shape: tuple[int, ...], bias: bool, inputs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5, bias=bias)).double()
    batches = [torch.randn(shape).double() for _ in range(3)]
    plain = pruned(model, batches[0], None, None)
    repaired = pruned(model, batches[0], least_squares(inputs), batches)
    assert error(repaired, model, batches) < error(plain, model, batches)
    x, _ = read_and_returned(repaired, "2", batches)
    _, wanted = read_and_returned(model, "2", batches)
    assert_best(repaired[2], x, wanted)


def test_layer_after_layer_is_fitted_to_what_it_reads_in_the_pruned_model() -> None:
    model = deep()
    plan = fxslim.plan_pruning(model, IMAGES[0], ratio=0.6, repair=least_squares(), data=IMAGES)
    repaired = plan.apply(copy.deepcopy(model))
    kept = {cut.name: list(cut.keep) for cut in plan.cuts if cut.dim == 0}
    for name in ("2", "5", "8"):
        x, _ = read_and_returned(repaired, name, IMAGES)
        _, wanted = read_and_returned(model, name, IMAGES)
        stays = kept.get(f"{name}.weight", list(range(4)))
        assert_best(repaired.get_submodule(name), x, wanted[:, stays])


def test_each_layer_is_fitted_to_what_it_reads_in_the_original() -> None:
    model = deep()
    plan = fxslim.plan_pruning(model, IMAGES[0], ratio=0.6, repair=least_squares("original"), data=IMAGES)
    repaired = plan.apply(copy.deepcopy(model))
    keep = {(cut.name, cut.dim): list(cut.keep) for cut in plan.cuts}
    for name in ("2", "5", "8"):
        x, wanted = read_and_returned(model, name, IMAGES)
        stays = keep.get((f"{name}.weight", 0), list(range(4)))
        inputs = keep[f"{name}.weight", 1]
        assert_best(repaired.get_submodule(name), x[:, inputs], wanted[:, stays])


def test_fresh_data_profit_too_and_the_pruned_models_inputs_are_better() -> None:
    model, fresh = deep(), [torch.randn(50, 2, 8, 8).double() for _ in range(4)]
    data = [torch.randn(400, 2, 8, 8).double() for _ in range(4)]
    kinds = (None, least_squares("original"), least_squares("pruned"))
    plain, original, sequential = (error(pruned(model, IMAGES[0], r, data), model, fresh) for r in kinds)
    assert sequential < original < plain


class Reused(nn.Module):
    """One layer called twice, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.a(x).relu()) + 2 * self.shared(self.b(x + 1).relu())


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_reused_layer_is_fitted_to_all_its_calls(inputs: str) -> None:
    torch.manual_seed(2)
    model, batches = Reused().double(), [torch.randn(64, 4).double() for _ in range(2)]
    repaired = pruned(model, batches[0], least_squares(inputs), batches)
    x, _ = read_and_returned(repaired, "shared", batches)
    _, wanted = read_and_returned(model, "shared", batches)
    assert x.shape == (256, repaired.shared.in_features)
    assert_best(repaired.shared, x, wanted)


def test_places_are_drawn_by_seed_and_the_same_for_input_and_output() -> None:
    model = deep()

    def weight(**changes: Any) -> Tensor:
        return pruned(model, IMAGES[0], least_squares(**changes), IMAGES)[2].weight.detach()

    some = weight(num_positions=100)
    torch.testing.assert_close(some, weight(num_positions=100), rtol=0, atol=0)
    assert not torch.equal(some, weight(num_positions=100, seed=1))
    # Where the kept channels say all, any few places find the same layer.
    wide = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 3, stride=2, padding=1)).double()
    wide = wide.requires_grad_(False)
    for inputs in INPUTS:
        repaired = pruned(wide, IMAGES[0], least_squares(inputs, num_positions=60), IMAGES, target="channels")
        assert error(repaired, wide, IMAGES) < 1e-6


@pytest.mark.parametrize("inputs", INPUTS)
def test_float32_and_bfloat16_models(inputs: str) -> None:
    for dtype, least in ((torch.float32, 0.8), (torch.bfloat16, 0.9)):
        model, batches = deep().to(dtype), [x.to(dtype) for x in IMAGES]
        plain = error(pruned(model, batches[0], None, None), model, batches)
        repaired = pruned(model, batches[0], least_squares(inputs), batches)
        assert repaired[2].weight.dtype == dtype
        assert error(repaired, model, batches) < least * plain


def test_weights_behind_a_layer_norm_stay_of_their_size() -> None:
    """What a layer norm makes is linearly dependent but for rounding: weights that use that can't be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 5))
    batches = [torch.randn(200, 6) for _ in range(4)]
    plan = fxslim.plan_pruning(model, batches[0], ratio=0.4, data=batches, repair="least_squares")
    plain = fxslim.plan_pruning(model, batches[0], ratio=0.4).apply(copy.deepcopy(model))
    mended = plan.apply(copy.deepcopy(model))
    with torch.no_grad():
        whole, left, better = (m(torch.randn(500, 6, generator=torch.Generator().manual_seed(1))) for m in
                               (model, plain, mended))  # fmt: skip
    assert mended[2].weight.abs().max() < 10 * model[2].weight.abs().max()
    assert (better - whole).norm() < 0.7 * (left - whole).norm()
