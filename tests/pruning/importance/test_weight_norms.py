# SPDX-License-Identifier: Apache-2.0
"""Weights under weight norm rank like the same weights as parameters, by every criterion."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxslim
from fxslim.batches import as_data
from fxslim.graph.weight_norms import make_plain
from fxslim.pruning.importance import channel_scores
from fxslim.pruning.importance.names import CRITERIA
from tests.graph.random_networks import randomise


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_ranks_like_plain_weights(criterion: str, dim: int | None) -> None:
    torch.manual_seed(0)
    normed = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3), "weight", dim), nn.BatchNorm2d(8), nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(8, 6, 3), "weight", dim), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(6, 8), "weight", min(dim or 0, 1)), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip
    randomise(normed).double()
    plain = copy.deepcopy(normed.eval())
    for module in plain.modules():
        make_plain(module)
    x, target = torch.randn(6, 3, 8, 8).double(), torch.randint(0, 4, (6,))
    found = []
    for model in (normed, plain):
        graph = fxslim.trace(model, x)
        skipped = [] if criterion != "dnn" else [c for g in graph.groups[:2] for c in g.channels]
        skipped += [] if "bn" not in criterion else [c for g in graph.groups[2:] for c in g.channels]
        data = as_data([(x, target)], None, None)
        found.append(
            [channel_scores(graph, model, criterion, 0, data, skipped)[group.channels] for group in graph.groups]
        )
    for a, b in zip(*found, strict=True):
        assert np.allclose(a, b, rtol=1e-4)
        assert len(a) > 1
