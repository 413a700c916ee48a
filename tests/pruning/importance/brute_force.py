# SPDX-License-Identifier: Apache-2.0
"""Criteria in plain loops over the places of a case, knowing nothing of graphs and slots."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxslim
from fxslim.batches import as_data
from fxslim.pruning.importance import channel_scores
from tests.pruning.importance.small_networks import Case, Place, slice_of

# What one place says of one channel: from the layer's name, the place and the channel.
Value = Callable[[Place, int], float]


def scores_by_group(case: Case, importance: Any, *, data: Any = None, seed: int = 0) -> dict[str, np.ndarray]:
    """What fxslim says."""
    graph = fxslim.trace(case.model, case.x)
    given = None if data is None else as_data(data)
    scores = channel_scores(graph, case.model, importance, seed, given)
    found = {group.name: scores[group.channels] for group in graph.groups}
    assert found.keys() == case.groups.keys()
    return found


def parts(case: Case, place: Place, channel: int, tensors: dict[str, Tensor] | None = None) -> list[list[float]]:
    """The numbers of a channel's slice of a weight (or of another tensor of its shape), for each of its entries."""
    module = case.model.get_submodule(place.layer)
    weight = module.weight if tensors is None else tensors[place.layer]
    return [
        weight[slice_of(module, place.role, e)].detach().flatten().double().tolist() for e in place.entries[channel]
    ]


def aggregated(
    case: Case,
    value: Value,
    *,
    roles: tuple[str, ...] = ("producer", "consumer", "depthwise"),
    normalize: str | None = "mean",
    per_entry: bool = True,
    total: bool = False,
) -> dict[str, np.ndarray]:
    """The mean over places; each is first divided by its mean over all channels of the layer, per entry."""
    by_layer: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for places in case.groups.values():
        for place in places:
            for channel, entries in enumerate(place.entries):
                found = value(place, channel), len(entries)
                by_layer.setdefault((place.layer, place.role), []).append(found)
    result = {}
    for name, places in case.groups.items():
        chosen = [place for place in places if place.role in roles]
        scores = []
        for channel in range(len(places[0].entries)):
            terms = []
            for place in chosen:
                all_values = by_layer[place.layer, place.role]
                mine, entries = value(place, channel), len(place.entries[channel])
                if normalize == "mean":
                    whole = sum(v for v, _ in all_values) / (
                        sum(n for _, n in all_values) if per_entry else len(all_values)
                    )
                    # A layer that says nothing (all its neurons dead) stays at 0.
                    mine = mine / (entries if per_entry else 1) / (whole or 1.0)
                elif normalize == "minmax":
                    low, high = min(v for v, _ in all_values), max(v for v, _ in all_values)
                    mine = (mine - low) / ((high - low) or 1.0)
                elif normalize == "max":
                    mine = mine / (max(v for v, _ in all_values) or 1.0)
                terms.append(mine)
            scores.append(sum(terms) / (1 if total else len(terms)))
        result[name] = np.array(scores)
    return result


def sample_products(case: Case) -> list[dict[str, Tensor]]:
    """Weight times gradient of each layer, for each sample, by ``backward`` on a copy."""
    found = []
    for x, target in zip(case.x, case.target, strict=True):
        model = copy.deepcopy(case.model).eval()
        nn.functional.cross_entropy(model(x[None]), target[None]).backward()
        found.append({n: m.weight.detach() * m.weight.grad for n, m in model.named_modules() if hasattr(m, "weight")})
    return found


def inputs_read(case: Case) -> dict[str, list[Tensor]]:
    """What each layer reads while the samples run, channels first."""
    found: dict[str, list[Tensor]] = {}
    model = copy.deepcopy(case.model).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(module: nn.Module, args: Any, name: str = name) -> None:
                dim = 1 if isinstance(module, nn.Conv2d) else -1
                found.setdefault(name, []).append(args[0].detach().movedim(dim, 0).flatten(1))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        for x in case.x:
            model(x[None])
    return found


def read_by(inputs: dict[str, list[Tensor]], place: Place, channel: int) -> list[list[float]]:
    """The numbers that a layer reads of each of a channel's entries."""
    return [[v for x in inputs[place.layer] for v in x[entry].double().tolist()] for entry in place.entries[channel]]


def distance(a: list[list[float]], b: list[list[float]]) -> float:
    """Euclidean."""
    return math.sqrt(sum((u - v) ** 2 for p, q in zip(a, b, strict=True) for u, v in zip(p, q, strict=True)))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=1e-12, err_msg=name)
