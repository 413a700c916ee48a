# SPDX-License-Identifier: Apache-2.0
"""Whole quantized networks under torch.compile, in one graph, and under torch.export."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.nn.quantizers import each_activation_quantizer
from fxslim.quantization import fake_quantization
from tests.quantization.small_networks import NETWORKS, batch, batches

METHODS = ("ulq", "lsq", "pact", "min_max", "static")
networks = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


def calibrated(network: str, method: str) -> nn.Module:
    model, (x, _) = NETWORKS[network](), batch()
    config = QuantConfig(activation=ActivationQuant(method=method))
    fxslim.prepare_qat(model, config, example_inputs=x).train()(x)
    return model


def assert_same_states(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


@pytest.mark.parametrize(
    ("network", "method"),
    [*(("convolutions", method) for method in METHODS), *(("vit", m) for m in ("ulq", "min_max"))],
)
def test_training_in_one_graph(network: str, method: str) -> None:
    """Three steps: outputs, gradients and what quantizers remember are those of eager mode."""
    model = calibrated(network, method)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    updates = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (plain, model)]
    for x, y in batches(3):
        outputs = []
        for net, update in zip((plain, compiled), updates, strict=True):
            update.zero_grad()
            outputs.append(net(x))
            nn.functional.cross_entropy(outputs[-1], y).backward()
        torch.testing.assert_close(*outputs)
        for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, msg=name)
        for update in updates:
            update.step()
        assert_same_states(plain, model)


@networks
@pytest.mark.parametrize("method", ["ulq", "static"])
def test_inference_in_one_graph(network: str, method: str) -> None:
    model, (x, _) = calibrated(network, method).eval(), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("method", ["ulq", "min_max"])
def test_switches_are_no_constants_of_the_compiled_graph(method: str) -> None:
    model, (x, _) = calibrated("convolutions", method).eval(), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        quantized = compiled(x)
        fake_quantization(model, False)
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.equal(compiled(x), quantized)


@pytest.mark.parametrize("method", ["ulq", "min_max"])
def test_calibration_in_compiled_training(method: str) -> None:
    """Counting batches may break the graph; ranges are those of eager mode."""
    model, (x, _) = NETWORKS["convolutions"](), batch()
    fxslim.prepare_qat(model, QuantConfig(activation=ActivationQuant(method=method, batch_num=2)), example_inputs=x)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for inputs, _ in batches(4):
        torch.testing.assert_close(compiled(inputs), plain(inputs))
    assert all(quantizer.is_calibrated for quantizer in each_activation_quantizer(model).values())
    assert_same_states(plain, model)


@networks
@pytest.mark.parametrize("method", ["ulq", "static"])
def test_exported(network: str, method: str) -> None:
    model, (x, _) = calibrated(network, method).eval(), batch()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
