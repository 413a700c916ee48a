# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing changes nothing: on no batch, the one where calibration ends included."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxslim.nn import ActivationQuant, LinearQAT, MultiheadAttentionQAT, QuantConfig, WeightQuant
from tests.nn.quantized.quantized_layers import KINDS

METHODS = ["ulq", "lsq", "lsq+", "pact", "static", "min_max"]


def steps(layer: nn.Module, batches: list[Tensor], reentrant: bool | None) -> list[Tensor]:
    """Outputs, gradients and states of every batch."""
    optimizer, found = torch.optim.SGD(layer.parameters(), lr=0.01), []

    def forward(x: Tensor) -> Tensor:
        y = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        return y.sin()

    for x in batches:
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        y = forward(x) if reentrant is None else checkpoint(forward, x, use_reentrant=reentrant)
        y.pow(2).sum().backward()
        # Parameters that a phase does not use yet have no gradient, or one of 0.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
        optimizer.step()
        found += [y.detach(), x.grad, *gradients, *(value.clone() for value in layer.state_dict().values())]
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("start_step", [0, 2])
def test_same_gradients(reentrant: bool, method: str, given: bool, start_step: int) -> None:
    clips = {"clip_min": -1.0, "clip_max": 1.5} if given else {"batch_num": 2}
    config = QuantConfig(
        weight=WeightQuant(bits=3, method="lsq"), activation=ActivationQuant(bits=3, method=method, **clips),
        start_step=start_step,
    )  # fmt: skip
    layer = LinearQAT(6, 4, config=config)
    other, batches = copy.deepcopy(layer), [torch.randn(5, 6) for _ in range(7)]
    for got, want in zip(steps(layer, batches, reentrant), steps(other, batches, None), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "attention"])
def test_every_layer(reentrant: bool, kind: str) -> None:
    cls, arguments, shape = KINDS.get(kind, (MultiheadAttentionQAT, (8, 2), (3, 2, 8)))
    layer: Any = cls(*arguments, config=QuantConfig(activation=ActivationQuant(batch_num=2), start_step=1))
    other, batches = copy.deepcopy(layer), [torch.randn(shape) for _ in range(6)]
    for got, want in zip(steps(layer, batches, reentrant), steps(other, batches, None), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
