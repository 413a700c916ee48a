# SPDX-License-Identifier: Apache-2.0
"""Quantizing is all or nothing: an interrupt at any line of the package leaves model and optimizer as they were."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import CalibrationError, PlanError
from tests.pruning.small_models import assert_unchanged, snapshot
from tests.quantization.small_networks import Residual

PACKAGE = str(Path(fxslim.__file__).parent)
X = torch.randn(2, 3, 8, 8)


class HandsOver(nn.Module):
    """A convolution, a block with a sum, a weight that is handed to a function, attention, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 4, 3), Residual(4)
        self.mixed, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.block(self.conv(x)).flatten(2).transpose(1, 2)
        x = nn.functional.linear(x, self.mixed.weight, self.mixed.bias)
        return self.attention(x, x, x, need_weights=False)[0]


def in_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with gradients, and an optimizer with state."""
    model = HandsOver()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model, optimizer


def deep_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Classes, submodules and the text of the model too."""
    return {
        **snapshot(model, optimizer),
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "text": str(model),
        "keys": list(model.state_dict()),
        "modes": torch._C._len_torch_function_stack(),
    }


class Interrupter:
    """Counts lines of the package as they run, and raises at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self.on_line

    def run(self, function: Callable[[], object]) -> str:
        """Where it was interrupted; empty, nowhere."""
        previous = sys.gettrace()
        sys.settrace(self.on_call)
        try:
            function()
        except KeyboardInterrupt as error:
            return str(error)
        finally:
            sys.settrace(previous)
        return ""


def test_an_interrupt_at_any_line_changes_nothing() -> None:
    model, optimizer = in_training()
    plan = fxslim.plan_quantization(model, example_inputs=X)
    assert any(layer.user is not None for layer in plan.layers)
    before, line, places = deep_snapshot(model, optimizer), 1, set()
    while place := Interrupter(line).run(lambda: plan.apply(model, optimizer=optimizer)):
        after = deep_snapshot(model, optimizer)
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert after[key] == value, (place, key)
        places.add(place)
        # A prime, so that loops over layers are met at different lines.
        line += 41
    assert len(places) > 40
    assert fxslim.applied(model) == [plan]
    model(X).square().sum().backward()
    optimizer.step()


def test_calibration_that_fails_changes_nothing() -> None:
    model, optimizer = in_training()
    before = deep_snapshot(model, optimizer)
    bad = [X, torch.full_like(X, torch.nan)]
    with pytest.raises(CalibrationError, match="batch 1 of data: the input of conv"):
        fxslim.quantize(model, data=bad, calibration="min_max")
    assert_unchanged(before, deep_snapshot(model, optimizer))


class Counting(nn.Module):
    """Fails when its layer is another class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.layer) is not nn.Linear:
            raise RuntimeError("made for plain layers")
        return self.layer(x)


def test_a_forward_that_fails_afterwards_is_undone() -> None:
    model = Counting()
    optimizer = torch.optim.AdamW(model.parameters())
    before = deep_snapshot(model, optimizer)
    with pytest.raises(PlanError, match=r"made for plain layers.*Nothing was changed"):
        fxslim.prepare_qat(model, example_inputs=torch.zeros(1, 4), optimizer=optimizer)
    assert_unchanged(before, deep_snapshot(model, optimizer))
