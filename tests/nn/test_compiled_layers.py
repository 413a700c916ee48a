# SPDX-License-Identifier: Apache-2.0
"""Masked layers under torch.compile and torch.export."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from fxslim.nn import MaskedLinear
from tests.nn.masked_layers import KINDS


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 2, 2)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_compiled_in_one_graph(x: torch.Tensor, training: bool, gradient: str) -> None:
    model = fxslim.sparsify(network(), "2:4", gradient=gradient).train(training)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for net in (model, compiled):
        net(x).pow(2).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_mask_is_no_constant_of_the_compiled_graph(x: torch.Tensor) -> None:
    model = fxslim.sparsify(network(), "2:4").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    model[6].set_mask(~model[6].weight_mask)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)


@pytest.mark.parametrize("regrow", [0.0, 2.0])
def test_masks_change_in_compiled_training(regrow: float) -> None:
    """Counting batches breaks the graph, and nothing else changes."""
    model = nn.Sequential(MaskedLinear(16, 8, pattern="2:4", update_freq=2, gradient="sr_ste", regrow=regrow))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2) for net in (plain, model)]
    for _ in range(6):
        x = torch.randn(3, 16)
        for net, optimizer in zip((plain, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).pow(2).sum().backward()
            optimizer.step()
        for one, other in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", [{}, {"update_freq": 1, "regrow": 0.1, "gradient": "sr_ste"}], ids=str)
def test_exported(x: torch.Tensor, settings: dict) -> None:
    model = fxslim.sparsify(network(), "2:4", **settings).eval()
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), model(x))
        assert "0.weight_mask" in program.state_dict


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exported(kind: str) -> None:
    cls, arguments, shape = KINDS[kind]
    layer, x = cls(*arguments, pattern="2:4").eval(), torch.randn(shape)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
