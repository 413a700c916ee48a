# SPDX-License-Identifier: Apache-2.0
"""Moves the masks of a model along their schedules."""

from torch import nn

from fxslim.errors import ConfigError
from fxslim.nn import MaskedWeights


def step_masks(model: nn.Module) -> nn.Module:
    """One step of every mask that has a schedule: call it as often as the schedule has steps; returns the model.

    >>> import fxslim
    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> net = fxslim.sparsify(net, "unstructured", ratio=0.5, schedule=fxslim.schedules.AGPSchedule(end=0.5, steps=2))
    >>> [round(1 - float(step_masks(net)[0].weight_mask.float().mean()), 2) for _ in range(3)]
    [0.44, 0.5, 0.5]
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, MaskedWeights) and m.weight_names and m.mask_settings.schedule is not None
    ]
    if not layers:
        raise ConfigError("no layer of this model has a mask with a schedule: sparsify(model, ..., schedule=...)")
    for layer in layers:
        layer.step()
    return model
