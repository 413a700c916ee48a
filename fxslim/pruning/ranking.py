# SPDX-License-Identifier: Apache-2.0
"""In which order channels go: a criterion's scores, over all groups or inside of each."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from fxslim.batches import Data
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.pruning.importance.names import Criterion, channel_scores

SCOPES = ("global", "layer")


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A criterion, what it looks at, and whether groups compete."""

    importance: Criterion
    scope: str
    seed: int
    data: Data | None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(unknown_name("scope", self.scope, SCOPES))

    def scores(self, graph: ChannelGraph, model: nn.Module, skipped: list[int]) -> np.ndarray:
        """A number for each class of channels: the lowest go first."""
        found = channel_scores(graph, model, self.importance, self.seed, self.data, skipped)
        return within_groups(graph, found) if self.scope == "layer" else found


def within_groups(graph: ChannelGraph, scores: np.ndarray) -> np.ndarray:
    """Scores that let every group lose the same share: the place of a channel in its own group."""
    places = scores.copy()
    for group in graph.groups:
        order = np.lexsort((group.channels, scores[group.channels]))
        places[group.channels[order]] = (np.arange(len(group)) + 0.5) / len(group)
    return places
