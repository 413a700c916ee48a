# SPDX-License-Identifier: Apache-2.0
"""Views that merge and split dims; a split decides which of the new dims shrinks."""

import math

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, compressed
from fxslim.graph.propagation import Propagation, Reshape, rule
from fxslim.graph.rules.heads import feeds_attention
from fxslim.graph.rules.sizes import (
    ATTRIBUTE,
    LITERAL,
    OWN,
    balance_counts,
    balance_readers,
    check_unlabelled,
    follow_count,
    shown_sizes,
    size_given,
    size_kind,
)


@rule("unsqueeze", "squeeze", "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def reshape(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Dims merge and split. Of the parts of a split dim one shrinks, the others stay as long as they are."""
    x = propagation.labels(node.args[0])
    assert x is not None
    before, shape = x.shape, node.meta["shape"]
    if 0 in shape:
        # No boxes were found: as if there were one.
        before = tuple(size or 1 for size in before)
        rest = math.prod(size for size in shape if size)
        if x.shape.count(0) > 1 or shape.count(0) > 1 or math.prod(before) % rest:
            return propagation.freeze_inputs(node, "a view of an empty tensor")
        shape = tuple(size or math.prod(before) // rest for size in shape)
    ids, sizes = x.ids, [1] * len(shape)
    runs = [run for run in matching_dims(before, shape) if any(ids.shape[d] > 1 for d in run[0])]
    for old, new in runs:
        for d in old:
            ids = np.repeat(ids, before[d], axis=d) if ids.shape[d] == 1 else ids
        for d in new:
            sizes[d] = shape[d]
    full, ids = ids.shape, ids.reshape(sizes)
    check_unlabelled(propagation, node, [d for d in range(len(shape)) if not any(d in new for _, new in runs)])
    settled = []
    for old, new in runs:
        dim, ids = _settle_run(propagation, node, ids, new)
        if dim is None:
            check_unlabelled(propagation, node, list(range(len(shape))))
            return propagation.freeze_inputs(node, _fixed_sizes(node))
        settled.append((tuple(old), tuple(new), dim))
    propagation.reshapes[node] = Reshape(full=full, whole=tuple(sizes), runs=tuple(settled))
    return compressed(Labels(shape=node.meta["shape"], ids=ids))


def _fixed_sizes(node: fx.Node) -> str:
    call = node.meta["call"]
    given = "" if call.sizes is None else f"{shown_sizes(call.sizes)} at {call.where}"
    return f"{call.name or 'view'}{given} has fixed sizes"


def _settle_run(propagation: Propagation, node: fx.Node, ids: Ids, new: list[int]) -> tuple[int | None, Ids]:
    """The new dim that shrinks (None if all are fixed), and the labels then."""
    varying = [d for d in compressed(Labels(shape=ids.shape, ids=ids)).varying if d in new]
    if len(varying) == 1 and propagation.space.keeps_rows(Labels(shape=ids.shape, ids=ids), varying[0]):
        # Rows that each keep their number, such as heads that get narrower.
        for d in new:
            follow_count(propagation, node, size_given(node, d), ids.reshape(-1)[:0], static=node.meta["shape"][d])
        return varying[0], ids
    dim = _shrinking_dim(propagation, node, ids, new, varying)
    elsewhere = any(size > 1 for d, size in enumerate(ids.shape) if d not in new)
    if dim is None or (len(varying) > 1 and (elsewhere or not _knows_sizes(node))):
        return None, ids
    line = np.moveaxis(ids, new, range(-len(new), 0)).reshape(-1, math.prod(ids.shape[d] for d in new))[0]
    parts = math.prod(ids.shape[d] for d in new if d != dim)
    follow_count(propagation, node, size_given(node, dim), line, parts=parts)
    balance_readers(propagation, node, size_given(node, dim), np.moveaxis(ids, dim, -1).reshape(-1, ids.shape[dim])[0])
    for d in new:
        if d != dim:
            nothing = line[:0]
            balance_counts(propagation, node, size_given(node, d), line)
            follow_count(propagation, node, size_given(node, d), nothing, static=node.meta["shape"][d])
    if len(varying) > 1:
        ids = _split(propagation, node, ids, varying, dim)
        if dim < varying[-1]:
            propagation.heads[node] = ids
    return dim, ids


def _shrinking_dim(propagation: Propagation, node: fx.Node, ids: Ids, new: list[int], varying: list[int]) -> int | None:
    """Which of the new dims gets shorter; None where none can."""
    kinds = {d: size_kind(propagation, size_given(node, d)) for d in varying}
    heads = [d for d in varying[:-1] if kinds[d] != LITERAL]
    attention = len(varying) > 1 and feeds_attention(node)
    one = any(ids.shape[d] == 1 and size_kind(propagation, size_given(node, d)) != LITERAL for d in new)
    in_width = propagation.decisions.heads == "dim" or (one and not heads)
    if node in propagation.decisions.narrow or (attention and in_width):
        # Heads stay and get narrower; so does a single one.
        propagation.narrower.append(ids)
        return varying[-1] if kinds[varying[-1]] != LITERAL else None
    if attention:
        # Whole heads: the dim before the width of a head.
        return next(iter(heads), None)
    own = next((d for d in varying if kinds[d] == OWN), None)
    return own if own is not None else next((d for d in reversed(varying) if kinds[d] == ATTRIBUTE), None)


def _knows_sizes(node: fx.Node) -> bool:
    return node.meta["call"].sizes is not None


def _split(propagation: Propagation, node: fx.Node, ids: Ids, dims: list[int], shrinking: int) -> Ids:
    """Entries behind the shrinking dim go together; rows before it keep equal counts."""
    for d in dims:
        if d > shrinking:
            first = ids.take([0], axis=d)
            propagation.space.unify(np.broadcast_to(first, ids.shape), ids)
            ids = first
    outer = [d for d in dims if d < shrinking]
    if not outer:
        return ids
    rows = ids.reshape(math.prod(ids.shape[:shrinking]), -1)
    if node in propagation.decisions.tied:
        propagation.space.unify(np.broadcast_to(rows[:1], rows.shape), rows)
        for d in outer:
            ids = ids.take([0], axis=d)
        return ids
    propagation.splits[node] = rows
    propagation.space.balance(rows, f"{len(rows)} rows of a view in {node.meta['module'] or 'the model'}")
    return ids


def matching_dims(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of old and new dims with equal numbers of elements, in order.

    >>> matching_dims((2, 6, 4, 4), (2, 2, 3, 16))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        run: tuple[list[int], list[int]] = ([], [])
        a = b = 1
        while not (run[0] or run[1]) or a != b:
            if (a <= b and i < len(old)) or j >= len(new):
                a, i = a * old[i], i + 1
                run[0].append(i - 1)
            else:
                b, j = b * new[j], j + 1
                run[1].append(j - 1)
        runs.append(run)
    return runs
