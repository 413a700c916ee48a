# SPDX-License-Identifier: Apache-2.0
"""Numbers that a forward computes from widths: a layer before them makes up for their change, or the width stays."""

import copy
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CheckpointError, ConfigError
from fxslim.graph.inputs import as_inputs
from fxslim.pruning.verification import TOLERANCE
from tests.graph.attention_networks import SCALES, SHARED, Correlation, ScaledAttention, SharedHead
from tests.graph.random_networks import randomise
from tests.graph.test_attention import WAYS, Transformer, tiny_swin
from tests.graph.test_attention import X as TOKENS

X = torch.randn(2, 7, 8)


def pruned(
    model: nn.Module, inputs: object, seed: int = 0, *, importance: object = "random", **settings: object
) -> fxslim.PruningPlan:
    """A random plan, proved, applied to a copy that trains, and costed as it will be."""
    plan = fxslim.plan_pruning(
        model, inputs, ratio=0.4, target="channels", importance=importance, seed=seed, max_ratio=0.7, **settings
    )
    proof = plan.verify(model, inputs)
    assert proof.ok, f"{proof}\n{plan}"
    assert proof.relative <= TOLERANCE
    smaller = plan.apply(copy.deepcopy(model))
    assert sum(p.numel() for p in smaller.parameters()) == plan.params[1]
    if not hasattr(model, "qkv"):
        # Heads that shrink beside a shared one that does not: the products' cost goes by the share of the whole layer.
        assert fxslim.trace(smaller, inputs).cost.macs == pytest.approx(plan.macs[1], abs=20)
    as_inputs(inputs)[0].run(smaller.train()).sum().backward()
    return plan


def cut_widths(plan: fxslim.PruningPlan, *names: str) -> bool:
    return any(cut.name.startswith(names) and cut.dim == 0 for cut in plan.cuts)


def favouring(name: str) -> Callable[[fxslim.ChannelGroup, nn.Module], Tensor]:
    """An importance by which channels go at random, those that layers of this name make before all others."""

    def importance(group: fxslim.ChannelGroup, model: nn.Module) -> Tensor:
        return torch.rand(len(group)) + (not any(layer.startswith(name) for layer in group.layers("producer")))

    return importance


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fused", [True, False])
def test_heads_get_narrower(scale: str, fused: bool) -> None:
    choice = random.Random(f"{scale}{fused}")
    model = randomise(ScaledAttention(scale, choice.choice([1, 2, 3]), choice.choice([5, 6, 8]), fused=fused))
    plans = [pruned(model, X, seed, heads="dim") for seed in range(3)]
    assert any(cut_widths(plan, "layers") for plan in plans)
    assert any(plan.scalings for plan in plans) == (scale != "attribute")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_attention_gets_narrower(way: str) -> None:
    model = randomise(Transformer(way))
    graph = fxslim.trace(model, TOKENS, heads="dim")
    assert list(graph.frozen_layers()) == ["head"], graph.report()
    plans = [pruned(model, TOKENS, seed, heads="dim", importance=favouring("attention")) for seed in range(3)]
    # Tables of angles have an entry for each place of a head; a norm's size is written beside its channels.
    assert any(cut_widths(plan, "attention.q", "attention.in_proj") for plan in plans) == (
        way not in ("rotary", "normed")
    )
    assert all(new.attribute.name != "num_heads" for plan in plans for new in plan.new_sizes)


def test_windows_get_narrower() -> None:
    plan = pruned(randomise(tiny_swin()), torch.randn(1, 3, 32, 32), heads="dim")
    assert cut_widths(plan, "features.1.0.attn.qkv")
    assert plan.scalings


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("heads", ["whole", "dim"])
def test_one_head_for_all_queries(way: str, heads: str) -> None:
    model = randomise(SharedHead(way))
    graph = fxslim.trace(model, X, heads=heads)
    if heads == "whole" and way != "fused":
        assert "one head is shared by all queries" in graph.explain("k")
        assert "one head is shared by all queries" in graph.explain("v")
    plans = [pruned(model, X, seed, heads=heads, importance=favouring("q")) for seed in range(3)]
    assert any(cut_widths(plan, "q") for plan in plans)


@pytest.mark.parametrize("joined", [True, False])
def test_correlation_of_two_images(joined: bool) -> None:
    model, pair = randomise(Correlation(joined=joined)), (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    plan = pruned(model, fxslim.Inputs(*pair))
    kept = next(len(cut.keep) for cut in plan.cuts if cut.name == "last.weight" and cut.dim == 0)
    assert plan.scalings[0].factor == pytest.approx((kept / 12) ** 0.25)


class Read(nn.Module):
    """A number computed from a width where no layer can make up for it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.width = way, 9
        self.a, self.b, self.head = nn.Linear(8, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.way == "two readers":
            return self.head(self.b(y / math.sqrt(y.shape[-1])) + self.b(y))
        if self.way == "added":
            return self.head(self.b(y + y.shape[-1] ** 0.5))
        if self.way == "bent":
            return self.head(self.b(torch.tanh(y) / math.sqrt(y.shape[-1])))
        if self.way == "path":
            return self.head(self.b(y.relu() if y.shape[-1] ** 0.5 > 2.9 else y))
        if self.way == "output":
            return self.head(self.b(y)) / y.shape[-1] ** 0.5
        return self.head(self.b(y).pow(2) * torch.tensor(y.shape[-1]))


def test_the_last_layer_makes_up_for_a_scaled_output() -> None:
    plan = pruned(randomise(Read("output")), X)
    assert {one.name for one in plan.scalings} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("way", ["two readers", "added", "bent", "path", "squared"])
def test_without_a_way_out_the_width_stays(way: str) -> None:
    model = randomise(Read(way))
    graph = fxslim.trace(model, X)
    assert "a number is computed from a width at test_width_scales.py" in graph.explain("a")
    assert "float attribute" in graph.report()
    pruned(model, X)


def test_a_scaled_model_masks_saves_and_loads(tmp_path) -> None:
    model = randomise(ScaledAttention("math"))
    plan = pruned(model, X, heads="dim")
    plan.save(tmp_path / "plan.json")
    loaded = fxslim.load_plan(tmp_path / "plan.json")
    assert loaded.scalings == plan.scalings != ()
    smaller = loaded.apply(copy.deepcopy(model)).eval()
    masked = plan.mask(copy.deepcopy(model)).eval()
    torch.testing.assert_close(masked(X), smaller(X))
    torch.testing.assert_close(plan.apply(masked)(X), smaller(X))
    empty = plan.apply(randomise(ScaledAttention("math"), 1), values=False).eval()
    empty.load_state_dict(smaller.state_dict())
    assert torch.equal(empty(X), smaller(X))


@pytest.mark.parametrize("damage", [["layers.0.weight", 0, "0", -1.0], ["layers.0.weight", 5, "0", 0.5]])
def test_damaged_scalings_are_refused(damage) -> None:
    plan = pruned(randomise(ScaledAttention("math")), X, heads="dim")
    with pytest.raises(CheckpointError, match="can't be scaled by"):
        fxslim.PruningPlan.from_dict(plan.to_dict() | {"scalings": [damage]})


def test_heads_are_whole_or_dim() -> None:
    with pytest.raises(ConfigError, match="heads='half' must be 'whole'"):
        fxslim.plan_pruning(nn.Linear(8, 3), X, heads="half")
