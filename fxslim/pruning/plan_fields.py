# SPDX-License-Identifier: Apache-2.0
"""Fields of a plan as plain data, and back: what does not fit the shapes that a plan knows is an error."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fxslim.errors import PlanError
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.tagged_sizes import Attribute
from fxslim.graph.width_scales import Scaling
from fxslim.plan.index_ranges import pack_ranges, unpack_ranges
from fxslim.pruning.constant_folding import Fold

Shapes = Mapping[str, tuple[int, ...]]


def unpack_sizes(data: Iterable[Any]) -> tuple[NewAttribute, ...]:
    """New values of attributes, from lists of module, name, item, before and after."""
    return tuple(
        NewAttribute(
            attribute=Attribute(module=str(module), name=str(name), item=None if item is None else int(item)),
            before=int(before),
            after=int(after),
        )
        for module, name, item, before, after in data
    )


def pack_scalings(scalings: Iterable[Scaling]) -> list[list[Any]]:
    """One list for each scaling.

    >>> pack_scalings([Scaling(name="q.weight", dim=0, entries=(0, 1, 3), factor=0.5)])
    [['q.weight', 0, '0-1,3', 0.5]]
    """
    return [[one.name, one.dim, pack_ranges(one.entries), one.factor] for one in scalings]


def unpack_scalings(data: Iterable[Any], shapes: Shapes) -> tuple[Scaling, ...]:
    """The scalings that ``pack_scalings`` wrote."""
    scalings = []
    for name, dim, entries, factor in data:
        if not 0 <= dim < len(shapes[name]) or not 0 < factor < math.inf:
            raise PlanError(f"dim {dim} of {name} of shape {shapes[name]} can't be scaled by {factor}")
        kept = unpack_ranges(entries, shapes[name][dim])
        scalings.append(Scaling(name=name, dim=int(dim), entries=kept, factor=float(factor)))
    return tuple(scalings)


def unpack_folds(data: Iterable[Any], shapes: Shapes) -> tuple[Fold, ...]:
    """Pairs of a weight and the bias or running mean that takes its constants."""
    folds = tuple(Fold(weight=weight, into=into) for weight, into in data)
    for name in (name for fold in folds for name in (fold.weight, fold.into)):
        if name not in shapes:
            raise PlanError(f"constants go from or into {name}, which the plan does not know")
    return folds
