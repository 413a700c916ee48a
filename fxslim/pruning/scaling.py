# SPDX-License-Identifier: Apache-2.0
"""Values of parameters that are scaled because a number that the forward computes from a width changes."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fxslim.graph.recording import named_states
from fxslim.graph.width_scales import Scaling


def scaled_values(model: nn.Module, scalings: Iterable[Scaling], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full-size values in float64, scaled where the plan says so; those already given are scaled in their place.

    >>> layer = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> scaled_values(layer, [Scaling(name="weight", dim=0, entries=(1,), factor=0.5)], {})
    {'weight': tensor([[1.0000],
            [0.5000]], dtype=torch.float64)}
    """
    states, result = dict(named_states(model)), dict(values)
    for one in scalings:
        old = result.get(one.name, states[one.name].detach())
        factors = torch.ones(old.shape[one.dim], dtype=torch.float64, device=old.device)
        factors[list(one.entries)] = one.factor
        broadcast = factors.view([-1 if d == one.dim else 1 for d in range(old.dim())])
        result[one.name] = old.double() * broadcast
    return result


def renamed_scalings(scalings: Iterable[Scaling], names: Mapping[str, str]) -> list[Scaling]:
    """Scalings with a model's own names."""
    return [dataclasses.replace(one, name=names[one.name]) for one in scalings]
