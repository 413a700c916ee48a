# SPDX-License-Identifier: Apache-2.0
"""What a criterion is: it looks at a context and gives a number for each class of channels."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.recording import named_states
from fxslim.graph.slots import Slot
from fxslim.graph.weight_norms import computed_weight, norms_of


class Importance:
    """A criterion: one number for each class of channels of ``context.graph.resolved``; the lowest go first.

    A criterion of one's own is a subclass; that of one group at a time is easier as a function of group and model.

    >>> class Position(Importance):
    ...     name = "position"
    ...     def scores(self, context):
    ...         return np.arange(len(context.graph.resolved.classes))
    """

    name: ClassVar[str]

    def scores(self, context: "Context") -> np.ndarray:
        """One number for each class of channels."""
        raise NotImplementedError(f"{type(self).__name__} has no method scores(context)")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a criterion may look at: groups, model, batches, seed, and classes that stay whatever their score."""

    graph: ChannelGraph
    model: nn.Module
    data: Data | None = None
    seed: int = 0
    skipped: Collection[int] = ()

    @cached_property
    def states(self) -> dict[str, Tensor]:
        return dict(named_states(self.model))

    def values_of(self, name: str) -> Tensor:
        """A parameter or buffer, which must have values; a masked or computed weight as its layer computes with it."""
        state = self.states[name]
        if state.is_meta:
            raise ConfigError(f"importance needs values, but {name} is on the meta device: use importance='random'")
        value = state.detach()
        for mask in self.graph.arranger.propagation.masks.get(name, ()):
            value = value * self.states[mask]
        if name in self.gains:
            gain, dim = self.gains[name]
            value = computed_weight(self.states[gain].detach(), value, dim).to(value.dtype)
        return value

    @property
    def gains(self) -> dict[str, tuple[str, int | None]]:
        """The gains of weights under weight norm, and their dims, by the names of the weights' directions."""
        return self.graph.arranger.propagation.gains

    def with_gradient(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
        """Each entry of a weight times the gradient of that entry, in float32 at least."""
        value, gradient = wide(self.states[name].detach()), wide(gradients[name])
        if name not in self.gains:
            return wide(self.values_of(name)) * gradient
        gain, dim = self.gains[name]
        along = (value.double() / norms_of(value, dim)).square().to(value.dtype)
        return value * gradient + along * (wide(self.states[gain].detach()) * wide(gradients[gain]))

    @cached_property
    def wanted(self) -> np.ndarray:
        """True for each class that may go: the others need no score."""
        wanted = np.zeros(len(self.graph.resolved.classes), dtype=bool)
        for group in self.graph.groups:
            wanted[group.channels] = True
        wanted[list(self.skipped)] = False
        return wanted

    def slots(self, roles: Iterable[str]) -> list[Slot]:
        """The slots of these roles that hold channels which may go."""
        of = self.graph.resolved.of
        return [slot for slot in self.graph.resolved.slots if slot.role in roles and self.wanted[of(slot)].any()]

    @cached_property
    def _holdings(self) -> dict[bytes, "Holding"]:
        return {}

    def holding(self, slot: Slot) -> "Holding":
        """The classes in a slot; many slots hold the same."""
        classes = self.graph.resolved.of(slot)
        key = classes.tobytes()
        if key not in self._holdings:
            self._holdings[key] = Holding(classes)
        return self._holdings[key]

    def required_data(self, name: str) -> Data:
        """The batches, for a criterion that can't do without."""
        if self.data is None:
            raise ConfigError(
                f"importance={name!r} looks at activations or gradients and needs data=: batches that the model runs on"
            )
        for state in self.states:
            self.values_of(state)
        return self.data

    def check_scored(self, scored: np.ndarray, what_is_missing: str) -> None:
        """Every channel that may go has a score, or an error names the first group that has none."""
        for group in self.graph.groups:
            missing = group.channels[self.wanted[group.channels] & ~scored[group.channels]]
            if len(missing):
                makers = group.layers("producer")
                raise ConfigError(
                    f"group {group.name}: {len(missing)} of its {len(group)} channels {what_is_missing}; "
                    f"skip={makers} leaves them whole, importance='l2' ranks all"
                )


def wide(values: Tensor) -> Tensor:
    """Products of half precision would lose small numbers."""
    return values if values.dtype == torch.float64 else values.float()


class Holding:
    """Which classes the entries of a slot belong to: a class of one channel has one entry, a head has many."""

    def __init__(self, classes: np.ndarray) -> None:
        self.one_each = bool((np.diff(classes) > 0).all())
        if self.one_each:
            self.classes, self.counts = classes, np.ones(len(classes))
        else:
            self.classes, self.inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
            self.counts = counts.astype(np.float64)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """One number for each class: the sum over its entries."""
        if self.one_each:
            return np.asarray(values, dtype=np.float64)
        return np.bincount(self.inverse, weights=values, minlength=len(self.classes))

    def maxima(self, values: np.ndarray) -> np.ndarray:
        """One number for each class: the largest of its entries."""
        if self.one_each:
            return np.asarray(values, dtype=np.float64)
        found = np.full(len(self.classes), -np.inf)
        np.maximum.at(found, self.inverse, values)
        return found

    def entries(self) -> dict[int, np.ndarray]:
        """For each number of entries: the entries of the classes that have so many, a row for each class."""
        if self.one_each:
            return {1: np.arange(len(self.classes))[:, None]}
        order = np.argsort(self.inverse, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)
        return {
            int(count): order[starts[self.counts == count][:, None] + np.arange(int(count))]
            for count in np.unique(self.counts)
        }


def check_choice(criterion: str, argument: str, value: object, known: Iterable[str | None]) -> None:
    """An argument of a criterion must be one of those known.

    >>> check_choice("taylor", "form", "squared", ["absolute", "squared"])
    """
    if value not in (choices := list(known)):
        named = unknown_name(argument, str(value), [str(choice) for choice in choices])
        raise ConfigError(f"importance {criterion!r}: {named}")
