# SPDX-License-Identifier: Apache-2.0
"""Applying is all or nothing: a failure at any write, and an interrupt at any line, leave everything as it was."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import PlanError
from fxslim.graph.surgery import cutting
from fxslim.graph.surgery.changes import Changes
from tests.pruning.small_models import X, assert_unchanged, small, snapshot

PACKAGE = str(Path(fxslim.__file__).parent)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, fused=True),
}


class Remembering(nn.Module):
    """Reads its sizes from attributes, and its forward changes a buffer, a number and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.width, self.fc = small()[:6], 24, nn.Linear(24, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.seen = 0, []
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(len(x))
        x = self.body(x).mean((2, 3)).view(-1, 1, self.width)
        x = self.fc(x)
        return self.attention(x, x, x)[0]


def in_training(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, fxslim.PruningPlan]:
    """A model with gradients, an optimizer with state, and a plan."""
    model = Remembering()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model, optimizer, fxslim.plan_pruning(model, X)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_failure_at_each_write_changes_nothing(kind: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, plan = in_training(kind)
    before, make = snapshot(model, optimizer), Changes.make
    failing, done = 0, 0

    def failing_make(self: Changes, change: Callable, restore: Callable) -> None:
        nonlocal done
        done += 1
        if done <= failing or late:
            make(self, change, restore)
        if done > failing:
            raise MemoryError(f"write {failing}")

    monkeypatch.setattr(Changes, "make", failing_make)
    while failing < 1000:
        done = 0
        try:
            plan.apply(model, optimizer=optimizer)
            break
        except MemoryError:
            assert_unchanged(before, snapshot(model, optimizer))
            failing += 1
    tensors = len({cut.name for cut in plan.cuts})
    kept = sum(isinstance(v, torch.Tensor) and v.dim() > 0 for s in optimizer.state.values() for v in s.values())
    assert failing > tensors + kept // 2
    assert fxslim.applied(model) == [plan]


class Interrupter:
    """Counts lines of the package as they run; raises at one of them."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.lines = at, error, 0

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise self.error(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self.on_line

    def run(self, function: Callable[[], object]) -> bool:
        """Whether it was interrupted."""
        previous = sys.gettrace()
        sys.settrace(self.on_call)
        try:
            function()
        except self.error:
            return True
        finally:
            sys.settrace(previous)
        return False


@pytest.mark.parametrize("apart", [True, False])
def test_an_interrupt_at_each_line_changes_nothing(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small parameters are put back in the way of large ones, also the one that is most of the model.
    monkeypatch.setattr(cutting, "_LARGE", 256)
    if apart:
        monkeypatch.setattr(cutting.Surgery, "_most_of_all", lambda self: "")
    model, optimizer, plan = in_training("adam")
    old_loss = model.eval()(X).square().sum()
    model.train()
    before, line = snapshot(model, optimizer), 1
    while Interrupter(line, KeyboardInterrupt).run(lambda: plan.apply(model, optimizer=optimizer)):
        assert_unchanged(before, snapshot(model, optimizer))
        line += 1
        if line == 200:
            # Nothing of the old graph was closed either: it still works.
            old_loss.backward()
            before = snapshot(model, optimizer)
    assert line > 500
    assert fxslim.applied(model) == [plan]


class HiddenSize(nn.Module):
    """Fails when it is pruned: a string is no size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if str(x.shape[1]) != "8":
            raise RuntimeError("made for 8 channels")
        return self.fc(x.mean((2, 3)))


def test_a_forward_that_fails_afterwards_is_undone() -> None:
    model = HiddenSize()
    plan = fxslim.plan_pruning(model, X, ratio=0.4)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"made for 8 channels.*Nothing was changed.*skip="):
        plan.apply(model)
    assert_unchanged(before, snapshot(model))


def test_a_failing_module_leaves_the_model_as_it_was_before_planning() -> None:
    for failing in range(len(list(small().modules()))):
        model = small()
        module = list(model.modules())[failing]
        module.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            fxslim.plan_pruning(model, X)
        assert_unchanged(before, snapshot(model))


def test_changes_are_taken_back_in_reverse_order() -> None:
    changes, owner = Changes(), nn.Linear(2, 3)
    for name, value in (("width", 1), ("width", 2), ("in_features", 9)):
        changes.set_attribute(owner, name, value)
    assert (owner.width, owner.in_features) == (2, 9)
    changes.undo()
    assert not hasattr(owner, "width")
    assert owner.in_features == 2
