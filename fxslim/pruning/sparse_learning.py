# SPDX-License-Identifier: Apache-2.0
"""Loss terms that make channels small while a model trains, so that removing them costs little."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.graph.channel_graph import trace
from fxslim.graph.layer_choice import Chosen, chosen_layers
from fxslim.graph.recording import named_states
from fxslim.graph.slots import entry_sums


class GroupLasso:
    """The sum of the L2 norms of all channels, each over everything that goes with it: whole channels become small.

    Groups of many weights are not favoured: each norm counts by the root of the channel's number of weights.
    Call it in the training loop: ``loss + 1e-4 * lasso(model)``.
    """

    def __init__(self, model: nn.Module, inputs: Any, *, skip: Chosen = (), **settings: Any) -> None:
        graph = trace(model, inputs, **settings)
        stays = chosen_layers(model, skip, "skip")
        groups = [g for g in graph.groups if stays.isdisjoint(g.layers("producer", "depthwise"))]
        if not groups:
            raise ConfigError(f"no channels can be removed, so there is nothing to make small:\n{graph.report()}")
        self.count = len(graph.resolved.classes)
        self.chosen = torch.cat([torch.from_numpy(g.channels) for g in groups])
        parameters = dict(model.named_parameters())
        slots = {slot.key: slot for g in groups for slot in g.slots if slot.name in parameters}
        self.places = [(slot, torch.from_numpy(graph.resolved.of(slot))) for slot in slots.values()]
        sizes = torch.zeros(self.count, dtype=torch.float64)
        for slot, classes in self.places:
            sizes.index_add_(0, classes, entry_sums(torch.ones_like(parameters[slot.name], device="cpu"), slot))
        self.roots = sizes.sqrt()

    def __call__(self, model: nn.Module) -> Tensor:
        """The term, differentiable, for the model as it is."""
        states = dict(named_states(model))
        device = next(iter(states.values())).device
        squares = torch.zeros(self.count, dtype=torch.float64, device=device)
        for slot, classes in self.places:
            squares = squares.index_add(0, classes.to(device), entry_sums(states[slot.name].square(), slot))
        chosen = squares[self.chosen.to(device)]
        # The root has no derivative at 0: a channel that is gone stays gone.
        norms = torch.where(chosen > 0, chosen.where(chosen > 0, torch.ones_like(chosen)).sqrt(), 0.0)
        return (norms * self.roots[self.chosen].to(device)).sum()


def batch_norm_l1(model: nn.Module, *, layers: Iterable[str | type] | None = None) -> Tensor:
    """The sum of the absolute scales of the batch norms (network slimming); prune with ``importance="bn"`` afterwards.

    >>> batch_norm_l1(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).item()
    8.0
    """
    chosen = None if layers is None else chosen_layers(model, layers, "layers")
    scales = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.weight is not None
        and (chosen is None or name in chosen)
    ]
    if not scales:
        raise ConfigError("the model has no batch norm with a scale: use GroupLasso")
    return torch.stack([scale.abs().sum() for scale in scales]).sum()
