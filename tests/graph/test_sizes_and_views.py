# SPDX-License-Identifier: Apache-2.0
"""Sizes that the forward reads, slices, splits and shuffles: pruned and proved, or kept with file and line."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxslim
from fxslim import PlanError
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise

X = torch.randn(2, 3, 12, 12)


class Reads(nn.Module):
    """conv -> what ``read`` does -> conv -> conv; 16 channels go in."""

    def __init__(self, read, out: int = 8) -> None:
        super().__init__()
        self.read, self.half, self.parts, self.width = read, 6, (4, 12), 16
        self.conv, self.next, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(out, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.next(self.read(self, torch.relu(self.conv(x))))))


def shuffled(m, x):
    b, c, h, w = x.shape
    return x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, -1, h, w)


def uneven(m, x):
    a, b = x.split([m.half, x.size(1) - m.half], 1)
    return torch.cat([b, a], 1)


def parts(m, x):
    a, b = torch.split(x, m.parts, 1)
    return torch.cat([b.relu(), a], 1)


def written_in_place(m, x):
    n = x.size(1) // 2
    x = x.clone()
    x[:, :n] += x[:, n:]
    return x


CASES = {
    "computed half": (lambda m, x: x[:, : x.size(1) // 2], 8),
    "second half": (lambda m, x: x[:, x.size(1) // 2 :], 8),
    "slice by an attribute": (lambda m, x: x[:, : m.half], 6),
    "literal head": (lambda m, x: x[:, 8:], 8),
    "literal tail": (lambda m, x: x[:, :-8], 8),
    "negative start": (lambda m, x: torch.cat([x[:, -8:], x], 1), 24),
    "narrow": (lambda m, x: x.narrow(1, 0, x.size(1) // 2), 8),
    "chunk": (lambda m, x: x.chunk(2, 1)[1], 8),
    "split by half": (lambda m, x: torch.split(x, x.size(1) // 2, 1)[0], 8),
    "split in attributes": (parts, 16),
    "split off an attribute": (uneven, 16),
    "unflatten and pick": (lambda m, x: x.unflatten(1, (2, -1))[:, 1], 8),
    "neighbours compete": (lambda m, x: x.view(x.size(0), x.size(1) // 2, 2, *x.shape[2:]).amax(2), 8),
    "rows are added": (lambda m, x: x.view(x.size(0), 2, -1, *x.shape[2:]).sum(1), 8),
    "softmax between rows": (lambda m, x: x.view(x.size(0), 2, -1, *x.shape[2:]).softmax(1)[:, 0], 8),
    "shuffle": (shuffled, 16),
    "shuffle and chunk": (lambda m, x: shuffled(m, x).chunk(2, 1)[0], 8),
    "view by an attribute": (lambda m, x: x.flatten(2).view(x.size(0), m.width, x.size(2), -1), 16),
    "view by a layer's attribute": (lambda m, x: x.view(-1, m.conv.out_channels, 10, 10), 16),
    "new zeros": (lambda m, x: x + torch.zeros(x.shape[0], x.shape[1], 1, 1), 16),
    "expand": (lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, x.size(1), 10, 10), 16),
    "changed in place": (written_in_place, 16),
}


def conv_first(group, model):
    """The channels of the layer under test go before all others."""
    return torch.arange(len(group)) / len(group) + ("conv" not in group.layers("producer"))


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_follow(name: str) -> None:
    torch.manual_seed(0)
    read, out = CASES[name]
    model = randomise(Reads(read, out))
    # The first step of a shuffle may be a large one: the target is the nearest that takes it.
    plans = (fxslim.plan_pruning(model, X, ratio=ratio, importance=conv_first) for ratio in (0.1, 0.2, 0.28, 0.4))
    plan = next(plan for plan in plans if any(cut.name == "conv.weight" for cut in plan.cuts))
    proof = plan.verify(model, [X, torch.randn(1, 3, 12, 12)])
    assert proof.ok, str(proof)
    assert proof.relative <= TOLERANCE
    again = fxslim.PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    again.apply(model)(X)


def test_a_shuffle_that_meets_what_it_shuffled_ties_whole_orbits() -> None:
    model = randomise(Reads(lambda m, x: shuffled(m, x) * x.sigmoid(), 16))
    sizes = [len(group) for group in fxslim.trace(model, X).groups if "conv" in group.layers("producer")]
    assert sum(sizes) == 10, sizes
    assert fxslim.plan_pruning(model, X, ratio=0.2, importance="random").verify(model, X).ok


LITERALS = {
    "view": (lambda m, x: x.view(-1, 16, 100).unflatten(2, (10, 10)), r"view\(-1, 16, 100\) at .*:\d+ has fixed sizes"),
    "split": (lambda m, x: torch.cat(torch.split(x, 8, 1), 1), r"split\(8, 1\) at .*:\d+ has fixed sizes"),
    "expand": (
        lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, 16, 10, 10),
        r"expand\(-1, 16, 10, 10\) at .*:\d+ has fixed sizes",
    ),
    "indices": (lambda m, x: x[:, (0,) * 16], "channels are picked by indices"),
}


@pytest.mark.parametrize("name", LITERALS)
def test_sizes_written_as_numbers_keep_their_channels(name: str) -> None:
    read, reason = LITERALS[name]
    model = randomise(Reads(read, 16))
    graph = fxslim.trace(model, X)
    assert re.search(reason, graph.explain("conv"))
    assert "conv" in graph.frozen_layers()
    assert fxslim.plan_pruning(model, X, ratio=0.2, importance="random").verify(model, X).ok


def test_an_attribute_read_in_two_ways_keeps_its_readers_whole() -> None:
    def read(m, x):
        return x[:, : m.half] + x[:, 10:] * torch.ones(m.half, 1, 1)

    model = randomise(Reads(read, 6))
    plan = fxslim.plan_pruning(model, X, ratio=0.1, importance="random")
    assert plan.verify(model, X).ok
    plan.apply(model)(X)


def test_attributes_follow_and_come_back() -> None:
    model = randomise(Reads(parts, 16))
    plan = fxslim.plan_pruning(model, X, ratio=0.3, importance="random")
    changed = {str(new.attribute): (new.before, new.after) for new in plan.new_sizes}
    assert set(changed) == {"parts[0]", "parts[1]"}
    other = Reads(parts, 16)
    other.parts = (5, 11)
    with pytest.raises(PlanError, match=r"parts\[0\] is 5, the plan was made for 4"):
        plan.apply(other)
    assert other.parts == (5, 11)
    plan.apply(model)
    assert model.parts == tuple(after for _, after in changed.values())
    assert isinstance(model.parts[0], int)
    assert type(model.half) is int


def test_shuffled_channels_lie_in_an_order_of_their_own() -> None:
    model = randomise(Reads(shuffled, 16))
    plan = fxslim.plan_pruning(model, X, ratio=0.4, importance="random")
    keep = next(cut.keep for cut in plan.cuts if cut.name == "next.weight" and cut.dim == 1)
    assert list(keep) != sorted(keep)
    pruned = plan.apply(model)
    assert F.relu(pruned(X)).shape == (2, 4, 10, 10)


def test_the_report_says_what_a_freeze_costs_and_what_would_lift_it() -> None:
    model = Reads(LITERALS["view"][0], 16)
    report = fxslim.trace(model, X).report()
    assert "2 layers keep all their channels" in report
    assert "64.3% of macs: conv: view(-1, 16, 100) at test_sizes_and_views.py:" in report
    assert "-> read the size from the tensor (x.flatten(1), x.shape[1])" in report
