# SPDX-License-Identifier: Apache-2.0
"""A function of the user's as a criterion: a number for each channel of one group after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.graph.groups import ChannelGroup
from fxslim.pruning.importance.criterion import Context, Importance

GroupFunction = Callable[[ChannelGroup, nn.Module], Tensor]


@dataclass(frozen=True)
class UsersFunction(Importance):
    """What ``function(group, model)`` returns: a number for each channel of the group."""

    name: ClassVar[str] = "function"
    function: GroupFunction

    def scores(self, context: Context) -> np.ndarray:
        """The function's numbers, group by group."""
        scores = np.zeros(len(context.graph.resolved.classes))
        for group in context.graph.groups:
            values = torch.as_tensor(self.function(group, context.model)).detach().to("cpu", torch.float64)
            if values.shape != (len(group),):
                raise ConfigError(
                    f"importance of group {group.name}: shape {tuple(values.shape)}, expected ({len(group)},)"
                )
            scores[group.channels] = values.numpy()
        return scores
