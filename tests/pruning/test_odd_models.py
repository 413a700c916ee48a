# SPDX-License-Identifier: Apache-2.0
"""Models that broke pruning once: each is proved right, or freezes, or fails with a reason."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxslim
from fxslim import PlanError, TraceError

X = torch.randn(2, 3, 16, 16)


@dataclass
class Out:
    feat: Tensor


class Net(nn.Module):
    """conv a, then a function of the model and its features, then conv b."""

    def __init__(self, middle: Callable) -> None:
        super().__init__()
        self.middle = middle
        self.a, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.b, self.fc = nn.Conv2d(16, 4, 3, padding=1), nn.Linear(16, 16)
        self.gain, self.norm = nn.Parameter(torch.rand(16)), nn.GroupNorm(4, 16, affine=False)
        self.register_buffer("low", -torch.rand(1, 16, 1, 1))

    def forward(self, x):
        return self.middle(self, self.a(x), x)


MODELS = {
    "dataclass output": lambda m, h, x: (m.b(h), Out(feat=h)),
    "group norm without weight": lambda m, h, x: m.b(torch.relu(m.norm(h))),
    "functional group norm": lambda m, h, x: m.b(F.group_norm(h, 4)),
    "clamp by a tensor": lambda m, h, x: m.b(torch.clamp(h, max=m.c(x))),
    "clamp by a buffer": lambda m, h, x: m.b(torch.clamp(h, m.low)),
    "pool over channels": lambda m, h, x: m.b(F.avg_pool3d(h.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1)),
    "local response norm": lambda m, h, x: m.b(F.local_response_norm(h, 5)),
    "roll over all": lambda m, h, x: m.b(torch.roll(h, 3)),
    "computed norm weight": lambda m, h, x: m.b(F.batch_norm(h, None, None, m.gain + 1, m.gain, training=True)),
    "weight as an output": lambda m, h, x: (m.b(h), m.fc(h.mean((2, 3))), m.fc.weight),
    "weight used twice": lambda m, h, x: m.b(h) + F.conv2d(x, m.a.weight[:4] * 0.5, padding=1),
    "big second output": lambda m, h, x: (m.b(torch.relu(h)), x[:, 0] * 0 - 1e9),
    "masked output": lambda m, h, x: m.b(h).masked_fill(x[:, :1] > 0, -torch.inf),
    "softmax over channels": lambda m, h, x: m.b(h.softmax(1)),
    "mean over channels": lambda m, h, x: m.b(h * h.mean(1, keepdim=True)),
    "in place on a slice": lambda m, h, x: m.b(h[:, :4].add_(1).new_zeros(()) + h),
    "out= into a slice": lambda m, h, x: m.b(torch.add(h, 1, out=torch.empty_like(h)[:, :])),
    "training feature": lambda m, h, x: (m.b(h), h) if m.training else m.b(h),
    "looks at a value": lambda m, h, x: m.b(h) if h.isfinite().all() else m.b(h * 2),
    "changes its input": lambda m, h, x: m.b(h) + x.mul_(2).sum(),
}


@pytest.mark.parametrize("name", MODELS)
def test_proved_or_frozen(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(MODELS[name]), X.clone()
    attributes = set(vars(model))
    try:
        plan = fxslim.plan_pruning(model, x, ratio=0.2, importance="random", target="params")
    except PlanError:
        # Everything is frozen: said, and nothing changed.
        return
    finally:
        assert torch.equal(x, X)
        assert set(vars(model)) == attributes
    assert plan.verify(model, x).relative < 1e-9
    assert torch.equal(x, X)
    with torch.no_grad():
        plan.apply(model).eval()(x.clone())


def test_training_only_feature_is_frozen() -> None:
    class Aux(Net):
        def forward(self, x):
            h = self.a(x)
            return (self.b(h), h) if self.training else self.b(h)

    assert "model output" in fxslim.trace(Aux(None), X).explain("a")


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_recurrent_layers_take_fewer_inputs(kind: type) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.fc = nn.Conv1d(3, 12, 3), kind(12, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.rnn(torch.relu(self.conv(x)).transpose(1, 2))[0][:, -1])

    x = torch.randn(2, 3, 10)
    model = Tower()
    plan = fxslim.plan_pruning(model, x, ratio=0.3, target="channels")
    assert plan.verify(model, x).ok
    plan.apply(model)(x)


def test_attention_keeps_its_width() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(12, 2)
            self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
            self.more = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

        def forward(self, x):
            h = self.conv(x).flatten(2).transpose(1, 2)
            return self.fc(self.attn(h, h, h)[0].mean(1)) + self.more(x).mean((2, 3))

    model = Mixed()
    plan = fxslim.plan_pruning(model, X, ratio=0.2, target="channels")
    assert {row.name for row in plan.rows} <= {"more.0", "conv", "attn.out_proj", "attn.in_proj_weight", "attn"}
    assert plan.verify(model, X).relative < 1e-9
    plan.apply(model)(X)


def test_macs_are_those_of_one_sample() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    macs = 16 * 16 * (3 * 8 * 9 + 8 * 8)
    assert fxslim.trace(conv, torch.randn(5, 3, 16, 16)).cost.macs == macs
    assert fxslim.trace(conv, torch.randn(3, 16, 16)).cost.macs == macs


def test_a_plan_on_another_dtype_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    plan = fxslim.plan_pruning(model, X)
    message = r"own forward fails on the plan's example inputs Inputs\(Tensor\(2, 3, 16, 16\)\)"
    with pytest.raises(TraceError, match=message):
        plan.apply(model.double())


def test_notes_of_paths_not_taken_are_in_the_plan() -> None:
    class Optional(Net):
        def forward(self, x, aux=False):
            h = self.a(x)
            return self.b(h) + (self.fc(h.mean((2, 3))).sum() if aux else 0)

    assert "note: fc.weight was not reached" in str(
        fxslim.plan_pruning(Optional(None), X, ratio=0.2, target="channels")
    )
