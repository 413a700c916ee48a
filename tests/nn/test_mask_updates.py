# SPDX-License-Identifier: Apache-2.0
"""When masks are made anew: by batches, by steps, after loading, under gradient checkpointing; and what comes back."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxslim.nn import MaskedConv2d, MaskedLinear, MaskSettings
from fxslim.patterns import NM, Block, Unstructured, check
from fxslim.schedules import AGPSchedule, ConstantSchedule, CosineSchedule, LinearSchedule
from tests.nn.masked_layers import seeds


def new_weights(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.detach().abs().unflatten(1, (-1, 4))
    return (groups > groups.sort(2).values[:, :, 1:2]).flatten(1)


@given(seed=seeds, frequency=st.none() | st.integers(0, 5), modes=st.lists(st.booleans(), min_size=1, max_size=14))
def test_masks_change_at_the_batches_of_the_rule(seed: int, frequency: int | None, modes: list[bool]) -> None:
    """batch % k == 0 of the training batches; 0: the first alone; None: never. Forwards in eval mode do not count."""
    torch.manual_seed(seed)
    layer = MaskedLinear(16, 4, pattern="2:4", update_freq=frequency)
    batch, want = 0, layer.weight_mask
    for training in modes:
        new_weights(layer)
        if training:
            due = frequency is not None and (batch % frequency == 0 if frequency else batch == 0)
            want = two_of_four(layer.weight) if due else want
            batch += 1
        layer.train(training)(torch.randn(2, 16))
        assert torch.equal(layer.weight_mask, want)
    assert frequency is None or int(layer.num_mask_batches) == batch


def build(regrow: float, frequency: int | None, scheduled: bool) -> nn.Sequential:
    settings = {"update_freq": frequency, "gradient": "sr_ste", "regrow": regrow}
    if scheduled:
        settings["schedule"] = AGPSchedule(end=0.7, steps=6)
    return nn.Sequential(
        MaskedLinear(16, 8, pattern="2:4", **settings),
        nn.ReLU(),
        MaskedLinear(8, 4, pattern=Unstructured(0.6), **settings),
    )


def run(model: nn.Sequential, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor], scheduled: bool) -> list:
    masks = []
    for x in batches:
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
        if scheduled:
            model[0].step()
            model[2].step()
        masks.append([model[0].weight_mask.clone(), model[2].weight_mask.clone()])
    return masks


@pytest.mark.parametrize("stop", range(7))
@pytest.mark.parametrize("frequency, scheduled", [(0, False), (1, False), (3, False), (2, True), (None, True)])
@pytest.mark.parametrize("regrow", [0.0, 2.0])
def test_interrupted_by_save_and_load_is_as_uninterrupted(stop: int, frequency, scheduled: bool, regrow: float) -> None:
    first = build(regrow, frequency, scheduled)
    second, batches = copy.deepcopy(first), [torch.randn(3, 16) for _ in range(7)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (first, second)]
    want = run(first, optimizers[0], batches, scheduled)
    got = run(second, optimizers[1], batches[:stop], scheduled)
    resumed = build(regrow, frequency, scheduled)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    got += run(resumed, optimizer, batches[stop:], scheduled)
    for old, new in zip(want, got, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for a, b in zip(first.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_two_forwards_before_one_backward(gradient: str) -> None:
    """Each graph knows the mask that its forward had, though the second made another."""
    layer = MaskedLinear(8, 4, bias=False, pattern="2:4", update_freq=1, gradient=gradient, decay=0.0)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    first, mask = layer(x), layer.weight_mask.clone()
    layer.set_mask(~mask)
    layer.mask_settings = MaskSettings(pattern="2:4", gradient=gradient, decay=0.0)
    second = layer(y)
    (first.sum() + 2 * second.sum()).backward()
    parts = x.sum(0).expand(4, 8), 2 * y.sum(0).expand(4, 8)
    want = parts[0] + parts[1] if gradient == "sr_ste" else parts[0] * mask + parts[1] * ~mask
    torch.testing.assert_close(layer.weight.grad, want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
@pytest.mark.parametrize("regrow", [0.0, 3.0])
def test_gradient_checkpointing_counts_each_batch_once(reentrant: bool, gradient: str, regrow: float) -> None:
    plain = MaskedLinear(16, 4, pattern="2:4", update_freq=2, gradient=gradient, regrow=regrow)
    other = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.3) for layer in (plain, other)]
    for batch in range(1, 6):
        x = torch.randn(3, 16, requires_grad=True)
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain(x).pow(2).sum().backward()
        checkpoint(other, x, use_reentrant=reentrant).pow(2).sum().backward()
        torch.testing.assert_close(plain.weight.grad, other.weight.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert int(plain.num_mask_batches) == int(other.num_mask_batches) == batch
        for a, b in zip(plain.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_batches_in_inference_mode_leave_a_layer_that_trains() -> None:
    layer = MaskedLinear(8, 4, pattern="2:4", update_freq=1, gradient="sr_ste", regrow=0.5)
    with torch.inference_mode():
        layer(torch.randn(2, 8))
    layer.mask_settings = MaskSettings(pattern="2:4", gradient="sr_ste")
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad.all()
    assert int(layer.num_mask_batches) == 1


@pytest.mark.parametrize("kind", [ConstantSchedule, LinearSchedule, AGPSchedule, CosineSchedule])
@pytest.mark.parametrize(
    "pattern",
    [NM(1, 4), NM(2, 8, 0), Block(cin=4, cout=2, ratio=0.7), Unstructured(0.3), Unstructured(0.9, True)],
    ids=str,
)
def test_schedules(kind, pattern) -> None:
    schedule = kind(end=0.7, steps=7, begin=2, start=0.1)
    layer = MaskedConv2d(16, 8, 2, pattern=pattern, schedule=schedule)
    for step in range(12):
        assert int(layer.num_mask_steps) == step
        now = pattern.gentler(pattern.removed() * schedule.value_at(step) / 0.7)
        assert torch.equal(layer.weight_mask, now.mask(layer.weight.detach()))
        assert check(layer, layer.current_pattern).ok
        new_weights(layer)
        layer.step()
    assert layer.current_pattern == pattern


@given(removed=st.floats(0.01, 0.99), end=st.floats(0.01, 0.99))
def test_at_the_end_of_a_schedule_the_pattern_is_the_pattern(removed: float, end: float) -> None:
    settings = MaskSettings(pattern=Unstructured(removed), schedule=LinearSchedule(end=end, steps=3))
    assert settings.pattern_at(3) == settings.pattern


@given(seed=seeds, regrow=st.sampled_from([0.01, 1.0, 10.0]), size=st.sampled_from([1e-3, 1.0, 8.0]))
def test_regrowth_by_its_formula(seed: int, regrow: float, size: float) -> None:
    """Kept weights by magnitude, masked ones by regrow x mean |weight| x |gradient| / mean |gradient|."""
    torch.manual_seed(seed)
    layer = MaskedLinear(16, 3, bias=False, pattern="2:4", regrow=regrow, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(size)
    layer.refresh()
    mask, x = layer.weight_mask.clone(), torch.randn(5, 16, dtype=torch.float64)
    layer(x).pow(2).sum().backward()
    weight = layer.weight.detach()
    gradient = (2 * (x @ (weight * mask).T).T @ x).abs()
    scores = torch.where(mask, weight.abs(), regrow * weight.abs().mean() * gradient / gradient.mean())
    layer.refresh()
    assert torch.equal(layer.weight_mask, two_of_four(scores))


def test_a_large_gradient_brings_a_weight_back() -> None:
    layer = MaskedLinear(4, 1, bias=False, pattern="2:4", regrow=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    layer.refresh()
    assert layer.weight_mask.tolist() == [[True, True, False, False]]
    layer(torch.tensor([[1.0, 1.0, 1.0, 97.0]])).sum().backward()
    layer.refresh()
    assert layer.weight_mask.tolist() == [[True, False, False, True]]
    assert layer.masked().tolist() == [[4.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("regrow", [1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_before_any_gradient_masks_go_by_magnitude(dtype: torch.dtype, regrow: float, scale: float) -> None:
    layer = MaskedLinear(16, 4, pattern="2:4", update_freq=0, regrow=regrow, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randperm(64).view(4, 16) * scale / 64)
    layer(torch.randn(2, 16, dtype=dtype))
    assert torch.equal(layer.weight_mask, two_of_four(layer.weight))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_a_skipped_step_bring_nothing_back(value: float) -> None:
    """Loss scaling skips steps whose gradients overflow."""
    layer = MaskedLinear(16, 4, bias=False, pattern="2:4", regrow=1.0)
    before = layer.weight_mask.clone()
    (layer(torch.ones(2, 16)) * value).sum().backward()
    layer.refresh()
    assert torch.equal(layer.weight_mask, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("small, large", [(1e-6, 4e-5), (1e-4, 60000.0)])
def test_regrowth_in_half_precision(dtype: torch.dtype, small: float, large: float) -> None:
    """Gradients whose mean, or quotients by it, half precision can't hold."""
    layer = MaskedLinear(512, 200, bias=False, pattern="2:4", regrow=1.0, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 1.0, 0.5, 0.5]).repeat(128).expand(200, 512))
    layer.refresh()
    x = torch.full((1, 512), small, dtype=dtype)
    x[0, 6] = large
    layer(x)[0].float().sum().backward()
    layer.refresh()
    want = torch.tensor([True, True, False, False]).repeat(128).expand(200, 512).clone()
    want[:, 5], want[:, 6] = False, True
    assert torch.equal(layer.weight_mask, want)
