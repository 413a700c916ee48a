# SPDX-License-Identifier: Apache-2.0
"""Data movement, executed on the labels themselves."""

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, compressed, fixed
from fxslim.graph.propagation import Propagation, as_int, as_node, operator_name, results_without_channels, rule


def _moved(node: fx.Node, ids: Ids) -> Labels:
    return compressed(Labels(shape=node.meta["shape"], ids=ids))


def _dim(value: object, rank: int) -> int:
    return as_int(value) % rank


@rule("permute", "transpose", "t", "numpy_T")
def permute(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Dims change places."""
    state = propagation.state_name(node)
    if state is not None:
        # A transposed weight: matrix products look at the parameter itself, anything else keeps it whole.
        if any(operator_name(user) not in ("mm", "addmm", "matmul", "t") for user in node.users) or not node.users:
            propagation.freeze_state(state, node, "a transposed parameter")
        return fixed(node.meta["shape"])
    x = propagation.labels(node.args[0])
    assert x is not None
    rank = len(x.shape)
    order = list(range(rank))
    if len(node.args) == 3:
        a, b = _dim(node.args[1], rank), _dim(node.args[2], rank)
        order[a], order[b] = order[b], order[a]
    elif len(node.args) == 2:
        order = [_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr]
    else:
        order.reverse()
    return _moved(node, x.ids.transpose(order))


@rule("unsqueeze", "squeeze", "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def reshape(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Dims merge and split; a labelled dim may merge with others, but not be split."""
    x = propagation.labels(node.args[0])
    assert x is not None
    shape = node.meta["shape"]
    sizes: list[int] = []
    ids = x.ids
    for old, new in matching_dims(x.shape, shape):
        varying = [d for d in old if ids.shape[d] > 1]
        long_new = [d for d in new if shape[d] > 1]
        if not varying:
            sizes += [1] * len(new)
        elif len(long_new) == 1:
            sizes += [shape[d] for d in new]
            for d in old:
                ids = np.repeat(ids, x.shape[d], axis=d) if ids.shape[d] == 1 else ids
        else:
            return propagation.freeze_inputs(node, f"{node.meta['function'] or 'view'} splits channels")
    return _moved(node, ids.reshape(sizes))


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
    return _moved(node, x.ids.reshape((1,) * missing + x.ids.shape))


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


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind")
def split(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Chunks of channels keep equal counts; sizes written as numbers freeze."""
    x = propagation.labels(node.args[0])
    assert x is not None
    results = results_without_channels(node)
    assert isinstance(results, list)
    is_unbind = "unbind" in str(node.target)
    dim = _dim(
        node.args[-1 if is_unbind and len(node.args) > 1 else 2] if len(node.args) > (1 if is_unbind else 2) else 0,
        len(x.shape),
    )
    if dim not in x.varying:
        return [Labels(shape=r.shape, ids=x.ids.squeeze(dim) if is_unbind else x.ids) for r in results]
    sizes = {r.shape[dim] for r in results if len(r.shape) == len(x.shape)}
    if node.meta["function"] != "chunk" or len(sizes) != 1 or x.shape[dim] % len(results):
        return propagation.freeze_inputs(node, f"{node.meta['function'] or 'split'} at fixed sizes")
    rows = x.vector(dim).reshape(len(results), -1)
    propagation.space.balance(rows, f"{len(results)} chunks in {node.meta['module'] or 'the model'}")
    return [
        compressed(Labels(shape=r.shape, ids=part))
        for r, part in zip(results, np.split(x.ids, len(results), axis=dim), strict=True)
    ]


@rule("slice", "select", "narrow", "flip", "roll")
def cut(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Along a dim without channels the labels pass; channels picked by number freeze."""
    x = propagation.labels(node.args[0])
    assert x is not None
    name, rank = str(node.target), len(x.shape)
    if "roll" in name and len(node.args) < 3:
        return propagation.freeze_inputs(node, "roll over all dims")
    dims = node.args[-1] if isinstance(node.args[-1], list | tuple) and ("flip" in name or "roll" in name) else None
    touched = [_dim(d, rank) for d in dims] if dims else [_dim(node.args[1] if len(node.args) > 1 else 0, rank)]
    whole = "slice" in name and x.shape == node.meta["shape"]
    if not whole and any(d in x.varying for d in touched):
        return propagation.freeze_inputs(node, f"{node.meta['function'] or 'slice'} picks channels by number")
    ids = x.ids.squeeze(touched[0]) if "select" in name else x.ids
    return Labels(shape=node.meta["shape"], ids=ids)
