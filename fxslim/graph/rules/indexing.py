# SPDX-License-Identifier: Apache-2.0
"""Entries picked by tensors of indices: tables of positions, gathers."""

import math
from typing import Any

from torch import fx

from fxslim.graph.labels import Labels, fixed
from fxslim.graph.propagation import Propagation, as_int, combined, rule


@rule("index")
def index(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Indices along dims without channels: the labels of the other dims pass."""
    x, given = propagation.labels(node.args[0]), node.args[1]
    if x is None or not isinstance(given, list | tuple):
        return propagation.freeze_inputs(node, "indexing")
    picked, _ = _picked(propagation, node, given)
    if not picked or picked != list(range(picked[0], picked[-1] + 1)):
        return propagation.freeze_inputs(node, "indexing along several dims apart")
    return _without(propagation, node, x, picked, [d for d in range(len(x.shape)) if d not in picked])


def _picked(propagation: Propagation, node: fx.Node, given: list[Any] | tuple[Any, ...]) -> tuple[list[int], int]:
    """The dims that indices take (a mask as many as it has itself), and how many there are in their place."""
    picked, dim, inserted = list[int](), 0, 0
    for item in given:
        wide = 1
        if isinstance(item, fx.Node):
            propagation.freeze(propagation.labels(item), node, "used as indices")
            rank = len(item.meta["shape"])
            wide, inserted = (rank, max(inserted, 1)) if item.meta["is_mask"] else (1, max(inserted, rank))
            picked += range(dim, dim + wide)
        dim += wide
    return picked, inserted


@rule("index_put")
def put(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Values are written to places along dims without channels: along the others they have the channels."""
    x, values, given = propagation.labels(node.args[0]), propagation.labels(node.args[2]), node.args[1]
    if x is None or values is None or not isinstance(given, list | tuple):
        return propagation.freeze_inputs(node, "written by indices")
    if _fills_by_mask(node, given):
        operands = [labels for labels in map(propagation.labels, (node.args[0], given[0])) if labels is not None]
        return combined(propagation, node, operands, x.shape)
    picked, inserted = _picked(propagation, node, given)
    if not picked or picked != list(range(picked[0], picked[-1] + 1)) or any(d in x.varying for d in picked):
        return propagation.freeze_inputs(node, "channels are written by indices")
    start, rank = picked[0], len(x.shape) - len(picked) + inserted
    missing = (1,) * (rank - len(values.shape))
    shape, ids = (*missing, *values.shape), values.ids.reshape(*missing, *values.ids.shape)
    if any(ids.shape[d] > 1 for d in range(start, start + inserted)):
        return propagation.freeze_inputs(node, "channels are written by indices")
    ones = (1,) * len(picked)
    placed = Labels(
        shape=(*shape[:start], *ones, *shape[start + inserted :]),
        ids=ids.reshape(*ids.shape[:start], *ones, *ids.shape[start + inserted :]),
    )
    return combined(propagation, node, [x, placed], x.shape)


def _without(
    propagation: Propagation, node: fx.Node, x: Labels, picked: list[int], whole: list[int]
) -> Labels | list[Labels]:
    """Labels of the dims that are kept, those of the picked dims replaced by dims of indices."""
    if any(d in x.varying for d in picked):
        for d in whole:
            x = propagation.tied_along(x, d)
        if any(d in x.varying for d in picked):
            return propagation.freeze_inputs(node, "channels are picked by indices")
    shape = node.meta["shape"]
    inserted = len(shape) - len(whole)
    before = len([d for d in whole if d < picked[0]])
    sizes = [x.ids.shape[d] for d in whole]
    ids = x.ids.reshape([*sizes[:before], *[1] * inserted, *sizes[before:]])
    return Labels(shape=shape, ids=ids)


def _fills_by_mask(node: fx.Node, given: list[Any] | tuple[Any, ...]) -> bool:
    """Whether one number is written where a mask of all dims says so: each element by itself."""
    mask, value = given[0], node.args[2]
    if not isinstance(mask, fx.Node) or not isinstance(value, fx.Node) or not mask.meta["is_mask"]:
        return False
    return mask.meta["shape"] == node.meta["shape"] and math.prod(value.meta["shape"]) == 1


@rule("index_select")
def select_entries(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """One tensor of indices along one dim."""
    x = propagation.labels(node.args[0])
    if x is None:
        return propagation.freeze_inputs(node, "indexing")
    dim = as_int(node.args[1]) % len(x.shape)
    propagation.freeze(propagation.labels(node.args[2]), node, "used as indices")
    return _without(propagation, node, x, [dim], [d for d in range(len(x.shape)) if d != dim])


@rule("gather")
def gather(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """The tensor of indices has an entry for each channel and does not shrink."""
    x, indices = propagation.labels(node.args[0]), propagation.labels(node.args[2])
    if x is None or indices is None or x.labelled or indices.labelled:
        return propagation.freeze_inputs(node, "gather")
    return fixed(node.meta["shape"])
