# SPDX-License-Identifier: Apache-2.0
"""Data movement, executed on the labels themselves."""

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, compressed, fixed
from fxslim.graph.propagation import Propagation, as_int, as_node, operator_name, rule
from fxslim.graph.rules.sizes import (
    LITERAL,
    check_unlabelled,
    follow_count,
    repeated,
    shown_sizes,
    size_given,
    size_kind,
)


def _moved(node: fx.Node, ids: Ids) -> Labels:
    return compressed(Labels(shape=node.meta["shape"], ids=ids))


def _dim(value: object, rank: int) -> int:
    return as_int(value) % rank


@rule("permute", "transpose", "t", "numpy_T")
def permute(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Dims change places."""
    products = ("mm", "addmm", "matmul", "t")
    if propagation.state_name(node) is not None and all(operator_name(user) in products for user in node.users):
        # A transposed weight: matrix products look at the parameter itself.
        return fixed(node.meta["shape"])
    x = propagation.labels(node.args[0])
    assert x is not None
    return _moved(node, x.ids.transpose(permuted_axes(node, len(x.shape))))


def permuted_axes(node: fx.Node, rank: int) -> list[int]:
    """The order of dims after a permutation."""
    order = list(range(rank))
    if len(node.args) == 3:
        a, b = _dim(node.args[1], rank), _dim(node.args[2], rank)
        order[a], order[b] = order[b], order[a]
    elif len(node.args) == 2:
        order = [_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr]
    else:
        order.reverse()
    return order


def _order(node: fx.Node) -> list[int]:
    """Dims longer than 1 by descending stride."""
    strides = node.meta["stride"]
    return sorted((d for d, size in enumerate(node.meta["shape"]) if size > 1), key=lambda d: -strides[d])


@rule("as_strided")
def restride(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Another memory layout of the same shape moves nothing; anything else is not followed."""
    x = propagation.labels(node.args[0])
    order = _order(as_node(node.args[0]))
    if x is not None and x.shape == node.meta["shape"] and order == _order(node):
        return x
    return propagation.freeze_inputs(node, "as_strided")


@rule("expand")
def expand(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """New elements repeat the old ones."""
    x = propagation.labels(node.args[0])
    assert x is not None
    missing = len(node.meta["shape"]) - len(x.shape)
    if not x.labelled:
        before = (1,) * missing + x.shape
        return repeated(propagation, node, [d for d, size in enumerate(before) if size == 1])
    check_unlabelled(propagation, node, [d for d in range(len(node.meta["shape"])) if d - missing not in x.varying])
    rows = [d for d in x.varying if propagation.space.keeps_rows(x, d)]
    check_unlabelled(propagation, node, [d + missing for d in rows])
    for d in (d for d in x.varying if d not in rows):
        given = size_given(node, d + missing)
        if size_kind(propagation, given) == LITERAL:
            check_unlabelled(propagation, node, list(range(len(node.meta["shape"]))))
            call = node.meta["call"]
            return propagation.freeze_inputs(
                node, f"{call.name}{shown_sizes(call.sizes)} at {call.where} has fixed sizes"
            )
        follow_count(propagation, node, given, x.line(d))
    return _moved(node, x.ids.reshape((1,) * missing + x.ids.shape))


@rule("repeat")
def repeat(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Whole copies one after the other along each dim; how many must not depend on channels."""
    x = propagation.labels(node.args[0])
    assert x is not None
    times = [as_int(t) for t in node.args[1]]  # type: ignore[union-attr]
    ids = x.ids.reshape((1,) * (len(times) - len(x.shape)) + x.ids.shape)
    for d, count in enumerate(times):
        follow_count(propagation, node, size_given(node, d), ids.reshape(-1)[:0], static=count)
    return _moved(node, np.tile(ids, [count if ids.shape[d] > 1 else 1 for d, count in enumerate(times)]))


@rule("unfold")
def slide(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Windows along a dim without channels get a dim of their own at the end."""
    x = propagation.labels(node.args[0])
    assert x is not None
    if _dim(node.args[1], len(x.shape)) in x.varying:
        return propagation.freeze_inputs(node, "windows over channels")
    return Labels(shape=node.meta["shape"], ids=x.ids[..., None])


@rule("cat")
def concatenate(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Labels one after the other."""
    parts = [labels for v in node.args[0] if (labels := propagation.labels(v)) is not None]  # type: ignore[union-attr]
    parts = [part for part in parts if len(part.shape) == len(node.meta["shape"])]
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(node.meta["shape"]))
    others = {d for part in parts if dim not in part.varying for d in part.varying}
    if len(others) == 1:
        # Some parts have channels along another dim: so have all.
        parts = [propagation.tied_along(part, *others) for part in parts]
    if any(d != dim for part in parts for d in part.varying):
        if all(dim not in part.varying for part in parts):
            return _stacked(propagation, node, parts)
        return propagation.freeze_inputs(node, "cat of labels along different dims")
    return _moved(
        node,
        np.concatenate([np.repeat(p.ids, p.shape[dim], dim) if p.ids.shape[dim] == 1 else p.ids for p in parts], dim),
    )


def _stacked(propagation: Propagation, node: fx.Node, parts: list[Labels]) -> Labels | list[Labels]:
    """Parts side by side along a dim without channels: each channel is one in all parts."""
    first = parts[0]
    for part in parts[1:]:
        if part.ids.shape != first.ids.shape or not part.labelled:
            return propagation.freeze_inputs(node, "cat of labels that differ")
        propagation.space.unify(first.ids, part.ids)
    return Labels(shape=node.meta["shape"], ids=first.ids)


@rule("stack")
def stack(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A new dim without channels."""
    parts = [labels for v in node.args[0] if (labels := propagation.labels(v)) is not None]  # type: ignore[union-attr]
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(node.meta["shape"]))
    widened = [Labels(shape=(*p.shape[:dim], 1, *p.shape[dim:]), ids=np.expand_dims(p.ids, dim)) for p in parts]
    return _stacked(propagation, node, widened) if any(p.labelled for p in parts) else fixed(node.meta["shape"])
