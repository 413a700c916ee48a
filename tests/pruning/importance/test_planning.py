# SPDX-License-Identifier: Apache-2.0
"""Every criterion plans on a convolutional net and on a transformer, and the plans are proved."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim import ConfigError
from fxslim.batches import as_data
from fxslim.pruning.importance import CRITERIA, Taylor, channel_scores
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import RandomNetwork, randomise
from tests.graph.test_attention import Transformer
from tests.pruning.small_models import X, assert_unchanged, small, snapshot

TOKENS, LABELS = torch.randn(4, 10, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"dnn"}))
def test_a_convolutional_net(name: str) -> None:
    model = small().train()
    before = snapshot(model)
    plan = fxslim.plan_pruning(model, X, ratio=0.4, importance=name, data=[(X, LABELS[:2])])
    assert_unchanged(before, snapshot(model))
    assert len(plan.cuts) > 1
    # Where only dead channels go, a proof says little.
    assert plan.verify(model, X).relative <= TOLERANCE
    again = fxslim.plan_pruning(small(), X, ratio=0.4, importance=name, data=iter([(X, LABELS[:2])]))
    assert again.to_dict() == plan.to_dict()


@pytest.mark.parametrize("way", ["module", "fused"])
@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"bn", "bn_similarity"}))
def test_a_transformer(name: str, way: str) -> None:
    model = randomise(Transformer(way))
    plan = fxslim.plan_pruning(model, TOKENS, ratio=0.4, importance=name, data=[(TOKENS, LABELS)])
    assert plan.cuts
    assert plan.verify(model, [TOKENS, torch.randn(1, 7, 8)]).ok


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["l2", "linf", "fpgm", "conv_similarity", "taylor", "apoz", "reconstruction"])
def test_random_networks(name: str, seed: int) -> None:
    """Every kind of layer and join gets scores, and the same ones again."""
    torch.manual_seed(seed)
    model, x = RandomNetwork(seed), torch.randn(2, 3, 8, 8)

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.square().mean()

    graph, data = fxslim.trace(model, x), as_data([x], loss=loss)
    gradients = dict(zip(dict(model.named_parameters()), _gradients(loss(model.eval()(x), None), model), strict=True))
    # Branches that end before the output.
    dead = [
        g for g in graph.groups if all(gradients[s.name] is None for s in g.slots if s.role in ("producer", "consumer"))
    ]
    if dead and name in ("taylor", "reconstruction"):
        with pytest.raises(ConfigError, match=f"group {dead[0].name}: {len(dead[0])} of its"):
            channel_scores(graph, model, name, 0, data)
    skipped = [channel for group in dead for channel in group.channels]
    first, again = (channel_scores(graph, model, name, 0, data, skipped) for _ in range(2))
    assert (first == again).all()
    for group in graph.groups:
        assert (first[group.channels] >= 0).all()
        assert group in dead or first[group.channels].any() or name == "apoz"


def _gradients(loss: torch.Tensor, model: nn.Module) -> Any:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_an_iterator_is_read_once_and_kept() -> None:
    """Where planning learns that more must stay, it ranks again."""
    reads = 0

    def batches() -> Iterator[Any]:
        nonlocal reads
        for _ in range(2):
            reads += 1
            yield X, LABELS[:2]

    plan = fxslim.plan_pruning(small(), X, importance=Taylor(form="gate"), data=batches())
    assert plan.cuts
    assert reads == 2


def test_dead_channels_go_first() -> None:
    """What gives nothing is found by all criteria of data."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].bias[[2, 5]] = -100.0
    for name in ("taylor", "fisher", "apoz", "mean_activation", "reconstruction"):
        plan = fxslim.plan_pruning(model, X, ratio=0.25, target="channels", importance=name, data=[(X, LABELS[:2])])
        assert {cut.keep for cut in plan.cuts} == {(0, 1, 3, 4, 6, 7)}, name
        assert plan.verify(model, X).max_abs_diff < 1e-9
