# SPDX-License-Identifier: Apache-2.0
"""What a target counts: the model's cost, or what a user measures, for any choice of kept channels."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from fxslim.errors import ConfigError
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.slots import SlotKey


class Budget(Protocol):
    """A number of the model that falls as channels go."""

    def left(self, kept: np.ndarray) -> float:
        """The number with only these classes of channels."""


class CostBudget:
    """macs, params, bitops, or the number of removable channels."""

    def __init__(self, graph: ChannelGraph, target: str) -> None:
        self.graph, self.target = graph, target
        self.free = np.concatenate([group.channels for group in graph.groups] or [np.zeros(0, dtype=np.int64)])
        removable = np.zeros(len(graph.resolved.classes), dtype=bool)
        removable[self.free] = True
        # Many slots hold the same channels: a share for all of them.
        self.places: dict[bytes, tuple[np.ndarray, list[SlotKey]]] = {}
        for slot in graph.resolved.slots:
            channels = graph.resolved.of(slot)
            if len(channels) and removable[channels].any():
                self.places.setdefault(channels.tobytes(), (channels, []))[1].append(slot.key)

    def left(self, kept: np.ndarray) -> float:
        """The cost when layers keep their shares of channels."""
        if self.target == "channels":
            return float(kept[self.free].sum())
        shares: dict[SlotKey, float] = {}
        for channels, keys in self.places.values():
            shares.update(dict.fromkeys(keys, np.count_nonzero(kept[channels]) / len(channels)))
        return float(getattr(self.graph.cost, f"{self.target}_with")(shares))


class MeasuredBudget:
    """What a function of the user's gives for the pruned model, for instance its latency; each choice is tried once."""

    def __init__(self, measure: Callable[[np.ndarray], float]) -> None:
        self.measure = measure
        self.known: dict[bytes, float] = {}

    def left(self, kept: np.ndarray) -> float:
        """What is measured for the model that keeps these channels."""
        key = np.packbits(kept).tobytes()
        if key not in self.known:
            value = float(self.measure(kept))
            if not 0 < value < float("inf"):
                raise ConfigError(f"measure(model) must return a positive, finite number, but returned {value}")
            self.known[key] = value
        return self.known[key]
