# SPDX-License-Identifier: Apache-2.0
"""Clips that an optimizer step made no range of: the last valid ones stand in, and gradients still flow."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim.nn import ActivationQuant
from fxslim.nn.quantizers import activation_quantizer
from tests.nn.quantized.quantized_layers import seeds

learned = pytest.mark.parametrize("method", ["ulq", "lsq+"])


def quantizer_of(method: str = "ulq", **settings: Any) -> Any:
    return activation_quantizer(ActivationQuant(method=method, clip_min=-1.0, clip_max=3.0, **settings))


def pushed(quantizer: Any, low: float | None, high: float) -> None:
    with torch.no_grad():
        quantizer.clip_max.fill_(high)
        if low is not None:
            quantizer.clip_min.fill_(low)


@learned
@pytest.mark.parametrize(
    "clips, in_force",
    [
        ((0.5, 3.5), (-1.0, 3.5)),
        ((-1.5, -0.5), (-1.5, 3.0)),
        ((2.0, 1.0), (-1.0, 3.0)),
        ((0.0, 0.0), (-1.0, 3.0)),
        ((-1e-8, 1e-8), (-1.0, 3.0)),
        ((-2.0, 0.0), (-2.0, 0.0)),
        ((0.0, 2.0), (0.0, 2.0)),
        ((-0.5, 2.0), (-0.5, 2.0)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_last_valid_clips_stand_in(method: str, clips, in_force, training: bool) -> None:
    quantizer, x = quantizer_of(method), torch.linspace(-4, 4, 41)
    quantizer(x)
    pushed(quantizer, *clips)
    y = quantizer.train(training)(x)
    low, high = in_force
    scale = (high - low) / 255
    assert quantizer.scale.item() == pytest.approx(scale)
    assert y.max().item() == pytest.approx(high, abs=scale)
    assert y.min().item() == pytest.approx(low, abs=scale)
    y.sum().backward()
    for clip in (quantizer.clip_min, quantizer.clip_max):
        assert clip.grad.isfinite().all()
        assert clip.grad.any()


@learned
def test_clips_come_back_by_themselves(method: str) -> None:
    """The gradient through a stand-in pulls a clip back into its side."""
    quantizer = quantizer_of(method)
    quantizer(torch.randn(10))
    pushed(quantizer, -1.0, -0.25)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        x = 5 + torch.rand(10)
        (quantizer(x) - x).pow(2).mean().backward()
        optimizer.step()
    assert quantizer.clip_max.item() > 0


@pytest.mark.parametrize("settings", [{"fixed_min": True}, {"symmetric": True}, {"method": "pact"}], ids=str)
@pytest.mark.parametrize("high", [0.0, -2.0, 1e-9])
def test_where_one_clip_is_learned(settings: dict[str, Any], high: float) -> None:
    quantizer = quantizer_of(**settings)
    y = quantizer(torch.linspace(-4, 4, 41))
    pushed(quantizer, None, high)
    again = quantizer(torch.linspace(-4, 4, 41))
    assert torch.equal(again, y)
    again.sum().backward()
    assert quantizer.clip_max.grad.any()


@given(
    seed=seeds, method=st.sampled_from(["ulq", "lsq+", "pact"]),
    moves=st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), max_size=8),
)  # fmt: skip
def test_any_moves_leave_a_range_with_zero_inside(seed: int, method: str, moves: list[tuple[float, float]]) -> None:
    torch.manual_seed(seed)
    quantizer, x = quantizer_of(method), torch.randn(20)
    for low, high in moves:
        pushed(quantizer, low if method != "pact" else None, high)
        y = quantizer(x.requires_grad_())
        low, high = quantizer.last_min.item(), quantizer.last_max.item()
        assert low <= 0 <= high
        assert high - low > 1e-7
        assert y.isfinite().all()
        assert quantizer(torch.zeros(1)).item() == 0
        quantizer.zero_grad()
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in quantizer.parameters())


def test_evaluation_changes_nothing() -> None:
    quantizer = quantizer_of()
    pushed(quantizer, -0.5, 1.0)
    quantizer.eval()(torch.randn(5))
    assert (quantizer.last_min.item(), quantizer.last_max.item()) == (-1.0, 3.0)
