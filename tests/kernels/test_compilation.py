# SPDX-License-Identifier: Apache-2.0
"""The operators inside torch.compile(fullgraph=True) and torch.export, training included."""

import os
import shutil

import pytest
import torch
from torch import nn

from fxslim import kernels


def bits(x: torch.Tensor) -> torch.Tensor:
    return kernels.fake_quantize(x, 0.05, 1, -128, 127)


class Quantizing(nn.Module):
    """Uses every differentiable operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.clips = nn.Parameter(torch.tensor([-1.0, 1.5]))
        self.scale = nn.Parameter(torch.full((4,), 0.02))
        self.register_buffer("nothing", torch.full((4,), torch.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = kernels.observe_fake_quantize(
            self.linear.weight, self.nothing, -self.nothing, -128, 127, averaging=1.0, symmetric=True, axis=0
        )[0]
        weight = weight * kernels.nm_mask(weight, 2, 4) * kernels.block_mask(weight, 0.3, cin=2, cout=2)
        x = kernels.fake_quantize_clipped(bits(x), self.clips[0], self.clips[1], -128, 127)[0]
        x = kernels.fake_quantize_float(x, 0.01, "fp8_e4m3")
        x = nn.functional.linear(x, weight, self.linear.bias)
        return kernels.fake_quantize_learned(x, self.scale, 0, -128, 127, axis=1)


def gradients(model: nn.Module, run, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    run(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
BACKENDS = ["aot_eager", *(["inductor"] if HAS_COMPILER else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
def test_compiled_training_equals_eager(backend: str, device) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Quantizing().to(device), torch.randn(5, 6, device=device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    for got, want in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(got, want)


@every_backend
def test_compiled_with_another_memory_format_of_the_gradient(backend: str, device) -> None:
    """A compiled graph may lay a gradient out otherwise than eager does."""
    torch._dynamo.reset()
    conv = nn.Conv2d(8, 8, 3, padding=1).to(device).to(memory_format=torch.channels_last)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = kernels.fake_quantize(conv(kernels.fake_quantize(x, 0.5, 0, -2, 1)), 0.1, 0, -8, 7)
        return (y.permute(0, 2, 3, 1).contiguous() * 3).permute(0, 3, 1, 2).relu()

    x = torch.randn(2, 8, 7, 9, device=device).contiguous(memory_format=torch.channels_last)
    for got, want in zip(
        gradients(conv, torch.compile(run, fullgraph=True, backend=backend), x), gradients(conv, run, x), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_dynamic_shapes_compile_once(device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(bits, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 17, 64):
        x = torch.randn(size, 5, device=device)
        assert torch.equal(compiled(x), bits(x))


def test_export_keeps_the_operators() -> None:
    model, x = Quantizing().eval(), torch.randn(5, 6)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    used = {str(node.target) for node in program.graph.nodes if "fxslim" in str(node.target)}
    assert used == {
        f"fxslim.{name}.default"
        for name in (
            "block_mask",
            "fake_quantize",
            "fake_quantize_clipped",
            "fake_quantize_float",
            "fake_quantize_learned",
            "nm_mask",
            "observe_fake_quantize",
        )
    }
    x = torch.randn(9, 6)
    assert torch.equal(program.module()(x), model(x))
