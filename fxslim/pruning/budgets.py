# SPDX-License-Identifier: Apache-2.0
"""What is asked of a plan, and what a target counts: the model's cost or what a user measures, for any channels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import nn

from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import free_channels
from fxslim.graph.slots import SlotKey
from fxslim.pruning.layer_limits import check_fraction

TARGETS = ("macs", "params", "channels", "bitops", "latency")
# A goal missed by more than this share of the whole is told.
_MISSED = 0.01


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a user asks for: a fraction to remove, or what may be left at most, of a number of the model."""

    ratio: float
    name: str
    at_most: float | None = None
    measure: Callable[[nn.Module], float] | None = None

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        if self.name not in TARGETS:
            raise ConfigError(unknown_name("target", self.name, TARGETS))
        if self.at_most is not None and self.ratio != 0.5:
            raise ConfigError(f"ratio={self.ratio} and at_most={self.at_most}: give ratio or at_most, not both")
        if self.at_most is not None and not _is_positive(self.at_most):
            raise ConfigError(f"at_most={self.at_most!r} must be a number above 0")
        if self.measure is not None and self.name != "latency":
            raise ConfigError(f"measure is what target='latency' counts, but target is {self.name!r}")

    def goal(self, everything: float) -> "Goal":
        """What is to be left of a model that counts ``everything``."""
        left = everything * (1 - self.ratio) if self.at_most is None else self.at_most
        return Goal(target=self.name, everything=everything, left=left, never_more=self.at_most is not None)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be left of a target: this much, or (``never_more``) as near below it as steps allow."""

    target: str
    everything: float
    left: float
    never_more: bool = False

    def distance(self, left: float) -> float:
        """How far from it a result is; infinite where it may not be."""
        return float("inf") if self.never_more and left > self.left else abs(left - self.left)

    def told(self, left: float) -> list[str]:
        """A note where a result misses it by more than one per cent of the whole."""
        if self.left >= self.everything or abs(left - self.left) <= _MISSED * self.everything:
            return []
        return [
            f"{readable(self.left)} {self.target} were asked for, {readable(left)} are left: as near as whole "
            "steps come (channels that only go together, round_to, overrides)"
        ]


def readable(number: float) -> str:
    """A count in full, a small measurement in four digits.

    >>> readable(1234567.4), readable(0.123456)
    ('1,234,567', '0.1235')
    """
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


class Budget(Protocol):
    """A number of the model that falls as channels go."""

    def left(self, kept: np.ndarray) -> float:
        """The number with only these classes of channels."""


class CostBudget:
    """macs, params, bitops, or the number of removable channels."""

    def __init__(self, graph: ChannelGraph, target: str) -> None:
        self.graph, self.target = graph, target
        self.free = free_channels(graph.groups)
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
            value = self.measure(kept)
            if not _is_positive(value) or value == float("inf"):
                raise ConfigError(f"measure(model) must return a positive, finite number, but returned {value!r}")
            self.known[key] = float(value)
        return self.known[key]
