# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile: one graph once there is a range, no look at tensors, and calibration goes on before."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxslim.nn import ActivationQuant, Conv2dQAT, LinearQAT, MultiheadAttentionQAT, QuantConfig, WeightQuant

METHODS = ["ulq", "lsq", "lsq+", "pact", "static", "min_max"]


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def config(method: str, weights: str = "arq", **settings: Any) -> QuantConfig:
    granularity = "tensor" if weights == "dorefa" else "channel"
    bits = 1 if weights == "binary" else 4
    weight = WeightQuant(bits=bits, method=weights, granularity=granularity)
    return QuantConfig(weight=weight, activation=ActivationQuant(bits=4, method=method), **settings)


def gradients(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    y = model(x)
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "method, weights", [*((m, "lsq") for m in METHODS), ("ulq", "arq"), ("ulq", "dorefa"), ("ulq", "binary")]
)
def test_one_graph(method: str, weights: str) -> None:
    model = nn.Sequential(Conv2dQAT(3, 4, 3, config=config(method, weights)), nn.ReLU(), nn.Flatten())
    model.append(LinearQAT(36, 2, config=config(method, weights)))
    x = torch.randn(2, 3, 5, 5)
    model(x)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False, True):
        twin.train(training)
        compiled.train(training)
        for got, want in zip(gradients(compiled, x), gradients(twin, x), strict=True):
            torch.testing.assert_close(got, want)


def test_repair_needs_no_look_at_the_clips() -> None:
    """The same graph serves valid clips and others."""
    layer: Any = LinearQAT(4, 3, config=config("ulq"))
    x = torch.randn(5, 4)
    layer(x)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, twin = torch.compile(layer, backend=counter, fullgraph=True), copy.deepcopy(layer)
    for low, high in ((-1.0, 2.0), (0.5, 2.0), (-1.0, -0.5), (1.0, -1.0)):
        for one in (layer, twin):
            with torch.no_grad():
                one.input_quantizer.clip_min.fill_(low)
                one.input_quantizer.clip_max.fill_(high)
        for got, want in zip(gradients(compiled, x), gradients(twin, x), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start_step", [0, 2])
def test_calibration_goes_on_in_compiled_code(method: str, start_step: int) -> None:
    """Graphs break until there is a range; what comes out is the same."""
    layer: Any = LinearQAT(4, 3, config=config(method, "lsq", start_step=start_step))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(5):
        x = torch.randn(5, 4)
        for got, want in zip(gradients(compiled, x), gradients(twin, x), strict=True):
            torch.testing.assert_close(got, want)
    assert layer.input_quantizer.is_calibrated
    assert layer.input_quantizer.batches_seen == twin.input_quantizer.batches_seen


def test_attention() -> None:
    layer: Any = MultiheadAttentionQAT(8, 2, config=config("ulq"))
    x = torch.randn(3, 2, 8)
    layer(x, x, x)
    compiled = torch.compile(lambda x: layer(x, x, x)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, x, x)[0])


def test_switches_are_seen_by_compiled_code() -> None:
    layer: Any = LinearQAT(4, 3, config=config("ulq"))
    x = torch.randn(5, 4)
    layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    state = copy.deepcopy(layer.state_dict())
    want = compiled(x)
    for quantizer in (layer.input_quantizer, layer.weight_quantizer):
        quantizer.enabled = False
    assert torch.equal(compiled(x), layer.to_float()(x))
    layer.load_state_dict(state)
    assert torch.equal(compiled(x), want)
