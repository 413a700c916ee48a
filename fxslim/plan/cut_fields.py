# SPDX-License-Identifier: Apache-2.0
"""Cuts as plain data, and back: what does not fit the shapes that a plan knows is an error."""

from collections.abc import Iterable, Mapping
from typing import Any

from fxslim.errors import PlanError
from fxslim.graph.surgery.cutting import Cut
from fxslim.plan.index_ranges import pack_ranges, unpack_ranges

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
    kept = unpack_ranges(keep, size)
    if blocks > 1:
        _check_blocks(name, dim, blocks, kept, size)
    return Cut(name=str(name), dim=int(dim), blocks=int(blocks), keep=kept, role=str(role))


def _check_blocks(name: str, dim: int, blocks: int, kept: tuple[int, ...], size: int) -> None:
    """Blocks of output channels share the inputs: each keeps as many, of its own."""
    each, rest = divmod(len(kept), blocks)
    if dim != 1 or rest:
        raise PlanError(f"{name}: {len(kept)} entries of dim {dim} can't be shared by {blocks} blocks")
    width = size // blocks
    if any(index // width != place // each for place, index in enumerate(kept)):
        raise PlanError(f"{name}: a block of {width} inputs keeps entries of another")
