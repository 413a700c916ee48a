# SPDX-License-Identifier: Apache-2.0
"""Entries picked by tensors of indices: tables of positions, gathers."""

from torch import fx

from fxslim.graph.labels import Labels, fixed
from fxslim.graph.propagation import Propagation, as_int, rule


@rule("index")
def index(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Indices along dims without channels: the labels of the other dims pass."""
    x, given = propagation.labels(node.args[0]), node.args[1]
    if x is None or not isinstance(given, list | tuple):
        return propagation.freeze_inputs(node, "indexing")
    if any(isinstance(item, fx.Node) and item.meta["is_mask"] and len(item.meta["shape"]) != 1 for item in given):
        # A mask takes as many dims as it has itself.
        return propagation.freeze_inputs(node, "indexing by a mask")
    picked = [d for d, item in enumerate(given) if isinstance(item, fx.Node)]
    whole = [d for d in range(len(x.shape)) if d not in picked]
    if picked != list(range(picked[0], picked[-1] + 1)):
        return propagation.freeze_inputs(node, "indexing along several dims apart")
    for labels in map(propagation.labels, (given[d] for d in picked)):
        propagation.freeze(labels, node, "used as indices")
    return _without(propagation, node, x, picked, whole)


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
