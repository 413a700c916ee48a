# SPDX-License-Identifier: Apache-2.0
"""The names of criteria, and the scores of whatever ``importance=`` was given."""

from collections.abc import Collection

import numpy as np
from torch import nn

from fxslim.batches import Data
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.pruning.importance.activations import APoZ, MeanActivation
from fxslim.pruning.importance.criterion import Context, Importance
from fxslim.pruning.importance.filter_weights import ConvAll, ConvAvg, ConvMax, ConvThreshold, Dnn
from fxslim.pruning.importance.fisher import Fisher
from fxslim.pruning.importance.geometric_median import FPGM
from fxslim.pruning.importance.magnitude import L1, L2, BalancedL2, LInf
from fxslim.pruning.importance.norm_weights import BatchNormWeight
from fxslim.pruning.importance.random_order import Random
from fxslim.pruning.importance.reconstruction import Reconstruction
from fxslim.pruning.importance.similarity import BatchNormSimilarity, ConvSimilarity
from fxslim.pruning.importance.taylor import Taylor
from fxslim.pruning.importance.users_function import GroupFunction, UsersFunction

# What importance= takes.
Criterion = str | Importance | GroupFunction

_KINDS: tuple[type[Importance], ...] = (
    *(L1, L2, LInf, BalancedL2, ConvAvg, ConvAll, ConvMax, ConvThreshold, ConvSimilarity, Dnn, FPGM),
    *(BatchNormWeight, BatchNormSimilarity, Taylor, Fisher, APoZ, MeanActivation, Reconstruction, Random),
)
CRITERIA = {kind.name: kind for kind in _KINDS} | {"hessian": Fisher}


def as_importance(importance: Criterion) -> Importance:
    """The criterion of a name; a criterion as it is; a function of group and model as a criterion.

    >>> as_importance("l2")
    L2(normalize='mean', over='group')
    """
    if isinstance(importance, Importance):
        return importance
    if isinstance(importance, type):
        raise ConfigError(f"importance={importance.__name__} is a class: give an instance, {importance.__name__}()")
    if not isinstance(importance, str):
        if callable(importance):
            return UsersFunction(importance)
        raise ConfigError(
            f"importance={importance!r} must be a name, an Importance, or a function of group and model "
            f"(names: {', '.join(sorted(CRITERIA))})"
        )
    if importance not in CRITERIA:
        raise ConfigError(unknown_name("importance", importance, CRITERIA))
    return CRITERIA[importance]()


def channel_scores(
    graph: ChannelGraph,
    model: nn.Module,
    importance: Criterion,
    seed: int,
    data: Data | None = None,
    skipped: Collection[int] = (),
) -> np.ndarray:
    """A finite score for each class of the graph; those of ``skipped`` classes need not mean anything."""
    criterion = as_importance(importance)
    context = Context(graph=graph, model=model, data=data, seed=seed, skipped=skipped)
    name = type(criterion).__name__
    scores = np.asarray(criterion.scores(context), dtype=np.float64)
    if scores.shape != (expected := (len(graph.resolved.classes),)):
        raise ConfigError(f"importance {name}: scores of shape {scores.shape}, expected {expected}, one for each class")
    for group in graph.groups:
        wrong = int((~np.isfinite(scores[group.channels[context.wanted[group.channels]]])).sum())
        if wrong:
            raise ConfigError(f"importance of group {group.name}: {wrong} of {len(group)} values are not finite")
    return scores
