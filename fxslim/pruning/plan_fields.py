# SPDX-License-Identifier: Apache-2.0
"""Fields of a plan as plain data, and back: what does not fit the shapes that a plan knows is an error."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fxslim.errors import PlanError
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.cutting import Cut
from fxslim.graph.tagged_sizes import Attribute
from fxslim.graph.width_scales import Scaling
from fxslim.plan.index_ranges import pack_ranges, unpack_ranges
from fxslim.pruning.constant_folding import Fold

Shapes = Mapping[str, tuple[int, ...]]
# Of a norm without parameters a plan does not know the size.
_LARGEST = 1 << 24


def pack_cuts(cuts: Iterable[Cut]) -> list[list[Any]]:
    """One list for each cut.

    >>> pack_cuts([Cut(name="conv.weight", dim=0, keep=(0, 1, 3), role="producer")])
    [['conv.weight', 0, 1, '0-1,3', 'producer']]
    """
    return [[cut.name, cut.dim, cut.blocks, pack_ranges(cut.keep), cut.role] for cut in cuts]


def unpack_cuts(data: Iterable[Any], shapes: Shapes) -> tuple[Cut, ...]:
    """The cuts that ``pack_cuts`` wrote."""
    cuts = tuple(_cut(shapes, *fields) for fields in data)
    if len({(cut.name, cut.dim) for cut in cuts}) != len(cuts):
        raise PlanError("a dim is cut twice")
    return cuts


def _cut(shapes: Shapes, name: str, dim: int, blocks: int, keep: str, role: str) -> Cut:
    """A cut that fits the shape of its parameter."""
    shape, size = shapes.get(name), _LARGEST
    if shape is not None:
        if not (0 <= dim < len(shape) and 1 <= blocks <= max(1, shape[0]) and shape[0] % blocks == 0):
            raise PlanError(f"{name} of shape {shape} has no dim {dim} in {blocks} blocks")
        size = shape[dim] * blocks
    return Cut(name=str(name), dim=int(dim), blocks=int(blocks), keep=unpack_ranges(keep, size), role=str(role))


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
