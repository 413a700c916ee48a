# SPDX-License-Identifier: Apache-2.0
"""A recorded forward leaves nothing behind: configurations and hooks as they were."""

import torch
from torch import Tensor, nn

import fxslim


class Settings:
    def __init__(self) -> None:
        self.kind: str | None = None


class Capturing(nn.Module):
    """Notes in a configuration what it was asked for, and hooks its layers at its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.hooked, self.seen = Settings(), False, []
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.settings.kind = "regression"
        self.settings.extra = 1
        if not self.hooked:
            self.hooked = True
            self.a.register_forward_hook(lambda *_: self.seen.append(1))
        self.seen.clear()
        y = self.b(torch.tanh(self.a(x)))
        return y * len(self.seen)


def test_configurations_and_hooks_are_as_before() -> None:
    model, x = Capturing(), torch.randn(2, 5)
    plan = fxslim.plan_pruning(model, x, ratio=0.3)
    assert plan.verify(model, x).ok
    plan.apply(model)
    assert vars(model.settings) == {"kind": None}
    assert not model.hooked
    assert not model.a._forward_hooks
    pruned = model(x)
    assert torch.equal(pruned, model.b(torch.tanh(model.a(x))))
    assert model.settings.kind == "regression"
