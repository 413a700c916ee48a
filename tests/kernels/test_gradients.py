# SPDX-License-Identifier: Apache-2.0
"""Gradients: against autograd of formulas written here with a straight-through round, in every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxslim import UnsupportedLayerError, kernels
from tests.strategies import LAYOUTS, grids, lay_out


class StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


straight_round = StraightThroughRound.apply


def column(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values
    return values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def inclusive_clamp(x, low, high):
    """A clamp whose gradient passes at the bounds themselves (torch.clamp's does not from 2.15 on)."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def fake_quantize_formula(x, scale, zero_point, low, high, axis=None):
    s, z = column(scale, x, axis), column(zero_point, x, axis)
    return (inclusive_clamp(straight_round(x / s) + z, low, high) - z) * s


def float_formula(x, scale, axis=None):
    """fp4_e2m1: steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6."""
    v = x / column(scale, x, axis)
    step = 0.5 + 0.5 * (v.detach().abs() >= 2) + (v.detach().abs() >= 4)
    return inclusive_clamp(straight_round(v / step) * step, -6, 6) * column(scale, x, axis)


def clipped_formula(x, clip_min, clip_max, low, high):
    scale = (clip_max - clip_min) / (high - low)
    zero_point = low - straight_round(clip_min / scale)
    inside = inclusive_clamp(x, scale * (low - zero_point), scale * (high - zero_point))
    return straight_round(inside / scale) * scale


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_fake_quantize_in_all_layouts_of_input_and_gradient(axis, x_layout, grad_layout, device) -> None:
    x = lay_out(normal(3, 5, 4, 6), x_layout).to(device).requires_grad_()
    grad = lay_out(normal(3, 5, 4, 6, seed=1), grad_layout).to(device)
    count = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.05, 0.4, count, dtype=torch.float64, device=device)
    zero_point = torch.arange(count, dtype=torch.int32, device=device) % 5 - 2
    y = kernels.fake_quantize(x, scale, zero_point, -8, 7, axis)
    want_y = fake_quantize_formula(x, scale, zero_point, -8, 7, axis if axis is None else axis % 4)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-15)
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(want_y, x, grad)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_fake_quantize_float_in_all_layouts_of_input_and_gradient(axis, x_layout, grad_layout, device) -> None:
    x = lay_out(normal(3, 5, 4, 6), x_layout).to(device).requires_grad_()
    grad = lay_out(normal(3, 5, 4, 6, seed=1), grad_layout).to(device)
    count = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.05, 0.4, count, dtype=torch.float64, device=device)
    y = kernels.fake_quantize_float(x, scale, "fp4_e2m1", axis)
    want_y = float_formula(x, scale, axis if axis is None else axis % 4)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-15)
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(want_y, x, grad)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipped_gradients(layout, device) -> None:
    x = lay_out(normal(3, 5, 4, 6) * 2, layout).to(device).requires_grad_()
    clips = [torch.tensor(v, dtype=torch.float64, device=device, requires_grad=True) for v in (-1.3, 1.9)]
    grad = lay_out(normal(3, 5, 4, 6, seed=1), layout).to(device)
    y = kernels.fake_quantize_clipped(x, *clips, -8, 7)[0]
    want_y = clipped_formula(x, *clips, -8, 7)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-12)
    got = torch.autograd.grad(y, [x, *clips], grad)
    want = torch.autograd.grad(want_y, [x, *clips], grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_clipped_vector_of_amct() -> None:
    """The published example: int8, clips -1 and 3."""
    x = torch.tensor([-1.5, -0.5, 0.2, 2.9, 3.5], requires_grad=True)
    clips = [torch.tensor(v, requires_grad=True) for v in (-1.0, 3.0)]
    y, scale, zero_point = kernels.fake_quantize_clipped(x, *clips, -128, 127)
    y.sum().backward()
    assert scale.item() == pytest.approx(0.01568627, abs=1e-8)
    assert zero_point.item() == -64
    torch.testing.assert_close(y.detach(), torch.tensor([-1.0039216, -0.5019608, 0.2039216, 2.9019608, 2.9960784]))
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert clips[1].grad.item() == pytest.approx(0.9990196, abs=1e-6)
    assert clips[0].grad.item() == pytest.approx(1.0009804, abs=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_gradients(axis, layout, device) -> None:
    x = lay_out(normal(3, 5, 4, 6), layout).to(device).requires_grad_()
    count = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.05, 0.4, count, dtype=torch.float64, device=device).requires_grad_()
    zero_point = torch.arange(count, dtype=torch.int32, device=device) % 5 - 2
    grad = lay_out(normal(3, 5, 4, 6, seed=1), layout).to(device)
    y = kernels.fake_quantize_learned(x, scale, zero_point, -8, 7, axis, grad_factor=1.0)
    want_y = fake_quantize_formula(x, scale, zero_point, -8, 7, axis)
    got = torch.autograd.grad(y, [x, scale], grad)
    want = torch.autograd.grad(want_y, [x, scale], grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_learned_default_factor_is_that_of_lsq() -> None:
    x, scale = normal(10, 30).float(), torch.full((10,), 0.1)
    grads = []
    for factor in (None, 1.0):
        s = scale.clone().requires_grad_()
        kernels.fake_quantize_learned(x, s, 0, -8, 7, axis=0, grad_factor=factor).sum().backward()
        grads.append(s.grad)
    torch.testing.assert_close(grads[0], grads[1] / (30 * 7) ** 0.5)


@pytest.mark.parametrize("averaging, symmetric", [(1.0, True), (1.0, False), (0.1, True), (None, False)])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_observed_gradients_match_the_grid_it_returns(averaging, symmetric, axis, device) -> None:
    x = (normal(6, 5, 4, 3) * 3).to(device).requires_grad_()
    count = 1 if axis is None else x.shape[axis]
    old = torch.linspace(0.5, 2, count, dtype=torch.float64, device=device)
    y, _, _, scale, zero_point = kernels.observe_fake_quantize(
        x, -old, old, -8, 7, averaging=averaging, symmetric=symmetric, axis=axis
    )
    want_y = fake_quantize_formula(x, scale, zero_point, -8, 7, axis)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-14)
    grad = normal(6, 5, 4, 3, seed=2).to(device)
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(want_y, x, grad)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@given(grid=grids(), seed=st.integers(0, 10**6), symmetric=st.booleans(), axis=st.sampled_from([None, 0, 1]))
def test_a_grid_made_from_the_data_clips_nothing(grid, seed, symmetric, axis) -> None:
    """Symmetric grids keep every value within half a step; so the identity gradient is the true one."""
    if symmetric and grid == (-1, 1):
        return
    x = normal(4, 33, seed=seed).float()
    nothing = torch.full((1 if axis is None else x.shape[axis],), torch.inf)
    y, _, _, scale, zero_point = kernels.observe_fake_quantize(
        x, nothing, -nothing, *grid, averaging=1.0, symmetric=symmetric, axis=axis
    )
    steps = (x / column(scale, x, axis)).round() + column(zero_point, x, axis)
    slack = 0 if symmetric else 1
    assert grid[0] - slack <= steps.min()
    assert steps.max() <= grid[1] + slack
    limit = (0.5 + slack) * 1.001 * column(scale, x, axis)
    assert torch.all((y - x).abs() <= limit + 1e-6)


def test_gradcheck_inside_a_cell() -> None:
    """The operators are linear in grad: checked by double differentiation of the mask selection."""
    x = normal(4, 6).requires_grad_()
    grad = normal(4, 6, seed=3).requires_grad_()
    y = kernels.fake_quantize(x, 0.3, 1, -4, 3)
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, torch.ones_like(first))
    assert torch.equal(second, (first != 0).double())
    mask = torch.tensor([0b10110101, 0b01, 0xFF], dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda g: torch.ops.fxslim.mask_gradient(g, mask, False), (grad,))
    assert torch.autograd.gradgradcheck(lambda g: torch.ops.fxslim.mask_gradient(g, mask, False), (grad,))


@pytest.mark.parametrize("name", ["fake_quantize_clipped", "fake_quantize_learned"])
def test_no_second_derivative_is_said_by_name(name: str) -> None:
    x = normal(4, 6).requires_grad_()
    parameters = (torch.tensor(-1.0), torch.tensor(1.0)) if "clipped" in name else (torch.tensor(0.1), 0)
    y = getattr(kernels, name)(x, *parameters, -8, 7)
    y = y[0] if isinstance(y, tuple) else y
    grad = torch.ones_like(y, requires_grad=True)
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    with pytest.raises(UnsupportedLayerError, match=f"{name} has no second derivative"):
        first.sum().backward()


def test_inference_makes_no_mask() -> None:
    x = torch.randn(100)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        kernels.fake_quantize(x, 0.1, 0, -8, 7)
        with torch.no_grad():
            kernels.fake_quantize(x.clone().requires_grad_(), 0.1, 0, -8, 7)
    flags = [args[-1] for func, args in seen if func is torch.ops.fxslim.fake_quantize.default]
    assert flags == [False, False]
