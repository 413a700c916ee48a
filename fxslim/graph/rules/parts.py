# SPDX-License-Identifier: Apache-2.0
"""Parts of a tensor along a dim: chunk, split, slice, select."""

import math
from typing import Any

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, compressed
from fxslim.graph.propagation import Part, Propagation, as_int, results_without_channels, rule
from fxslim.graph.rules.sizes import LITERAL, channels_of, follow_count, shown_sizes, size_kind
from fxslim.graph.tagged_sizes import Extent, TaggedInt, leaves


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unsafe_split_with_sizes")
def split(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Parts that are made by their number, or whose sizes are one size, keep equal counts."""
    x = propagation.labels(node.args[0])
    assert x is not None
    results = results_without_channels(node)
    assert isinstance(results, list)
    dim = (as_int(node.args[2]) if len(node.args) > 2 else as_int(node.kwargs.get("dim", 0))) % len(x.shape)
    if dim not in x.varying:
        given = (node.meta["call"].sizes or (None,))[0]
        for size, result in zip(given if isinstance(given, tuple) else (given,), results, strict=False):
            follow_count(propagation, node, size, np.zeros(0, dtype=np.int64), static=result.shape[dim])
        return [Labels(shape=r.shape, ids=x.ids) for r in results]
    sizes = _part_sizes(node, x.shape[dim])
    stops = np.cumsum(sizes).tolist()
    pieces = [x.ids.take(range(stop - size, stop), axis=dim) for size, stop in zip(sizes, stops, strict=True)]
    problem = _settle_pieces(propagation, node, pieces, dim)
    if problem:
        propagation.freeze(x, node, problem)
    for item in node.users:
        index = as_int(item.args[1])
        propagation.parts[item] = Part(dim=dim, start=stops[index] - sizes[index], stop=stops[index])
    return [compressed(Labels(shape=r.shape, ids=pieces[i])) if r.shape else r for i, r in enumerate(results)]


def _part_sizes(node: fx.Node, length: int) -> list[int]:
    given = node.args[1]
    if isinstance(given, list | tuple):
        return [as_int(size) for size in given]
    size = as_int(given)
    if "chunk" in str(node.target):
        size = math.ceil(length / size)
    return [min(size, length - start) for start in range(0, length, size)]


def _settle_pieces(propagation: Propagation, node: fx.Node, pieces: list[Ids], dim: int) -> str:
    """Constraints between the pieces; why there is no way for them to shrink, or nothing."""
    call = node.meta["call"]
    lines = [np.moveaxis(piece, dim, -1).reshape(-1, piece.shape[dim])[0] for piece in pieces]
    alike = len({piece.shape[dim] for piece in pieces}) == 1
    fixed = f"{call.name or 'split'}{shown_sizes(call.sizes or ())} at {call.where} has fixed sizes"
    where = f"{len(pieces)} chunks in {node.meta['module'] or 'the model'}"
    _keep_even(propagation, node, pieces)
    if call.name in ("chunk", "tensor_split", "glu") or call.sizes is None:
        if alike:
            propagation.space.balance(np.stack([piece.reshape(-1) for piece in pieces]), where)
        return "" if alike else f"{call.name or 'split'} in unequal parts"
    given = call.sizes[0] if call.sizes else None
    if isinstance(given, tuple):
        return _settle_sizes(propagation, node, lines, given) or ""
    if given is None or size_kind(propagation, given) == LITERAL:
        return fixed
    if not alike:
        return f"{call.name} in unequal parts"
    propagation.space.balance(np.stack([piece.reshape(-1) for piece in pieces]), where)
    follow_count(propagation, node, given, lines[0])
    return ""


def _keep_even(propagation: Propagation, node: fx.Node, pieces: list[Ids]) -> None:
    """Where it was decided so, what each piece holds of each shuffled row keeps as many entries as any other."""
    for owner, view in propagation.decisions.even:
        if owner is node and view in propagation.splits:
            cells = [row[np.isin(row, piece)] for piece in pieces for row in propagation.splits[view]]
            if cells[0].size and len({cell.size for cell in cells}) == 1:
                propagation.space.balance(
                    np.stack(cells), f"parts of shuffled rows in {node.meta['module'] or 'the model'}"
                )


def _settle_sizes(propagation: Propagation, node: fx.Node, lines: list[Ids], given: tuple[Any, ...]) -> str:
    """A list of sizes: those written down keep their part whole."""
    call = node.meta["call"]
    followed: dict[Any, Ids] = {}
    for line, size in zip(lines, given, strict=True):
        if not isinstance(size, TaggedInt) or size_kind(propagation, size) == LITERAL:
            propagation.freeze(
                Labels(shape=(), ids=line), node, f"a part of {int(size)} channels split at {call.where}"
            )
            continue
        same = followed.setdefault(size.expression, line)
        if same is not line:
            propagation.space.balance(np.stack([same, line]), f"parts of one size split at {call.where}")
        follow_count(propagation, node, size, line)
    return ""


@rule("slice", "narrow")
def cut(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Entries before a bound that is written down stay; computed bounds follow."""
    x = propagation.labels(node.args[0])
    assert x is not None
    dim = (as_int(node.args[1]) if len(node.args) > 1 else 0) % len(x.shape)
    if x.shape == node.meta["shape"] or dim not in x.varying:
        return Labels(shape=node.meta["shape"], ids=x.ids)
    if len(node.args) > 4 and as_int(node.args[4]) != 1:
        return propagation.freeze_inputs(node, f"a slice with steps at {node.meta['call'].where}")
    length, size = x.shape[dim], node.meta["shape"][dim]
    start = as_int(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else 0
    start = max(0, start + length if start < 0 else start)
    stop = start + size
    given = _bounds_given(node, start, stop, length)
    if given is None:
        return propagation.freeze_inputs(node, f"{node.meta['call'].name or 'slice'} picks channels by number")
    for bound, position in zip(given, (start, stop), strict=True):
        if position not in (0, length):
            _settle_bound(propagation, node, x, dim, bound, position)
    propagation.parts[node] = Part(dim=dim, start=start, stop=stop)
    return compressed(Labels(shape=node.meta["shape"], ids=x.ids.take(range(start, stop), axis=dim)))


def _settle_bound(propagation: Propagation, node: fx.Node, x: Labels, dim: int, bound: Any, position: int) -> None:
    """One bound inside the channels."""
    where = node.meta["call"].where
    length = x.shape[dim]
    line = x.line(dim)
    before = x.ids.take(range(position), axis=dim)
    if not isinstance(bound, TaggedInt) or size_kind(propagation, bound) == LITERAL:
        if bound is not None and int(bound) < 0:
            before = x.ids.take(range(position, length), axis=dim)
        propagation.freeze(Labels(shape=(), ids=before), node, f"a slice up to {position} at {where}")
        return
    piece = math.gcd(position, length)
    read = [channels_of(propagation, leaf) for leaf in leaves(bound.expression) if isinstance(leaf, Extent)]
    if any(ids is not None and np.array_equal(np.sort(ids), np.sort(line)) for ids in read):
        pieces = np.split(x.ids, length // piece, axis=dim)
        propagation.space.balance(np.stack([p.reshape(-1) for p in pieces]), f"parts of a slice at {where}")
        _keep_even(propagation, node, pieces)
    if int(bound) >= 0:
        follow_count(propagation, node, bound, line[:position])


def _bounds_given(node: fx.Node, start: int, stop: int, length: int) -> tuple[Any, Any] | None:
    """The bounds of this slice as the user's code gave them; None if it can't be told."""
    call = node.meta["call"]
    if call.name == "narrow" and call.sizes is not None and len(call.sizes) >= 3:
        return call.sizes[1], call.sizes[1] + call.sizes[2]
    if call.name not in ("__getitem__", "__setitem__") or call.sizes is None:
        return None
    index = call.sizes[0]
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice) and item.indices(length)[:2] == (start, stop):
            return item.start, item.stop
    return None


@rule("select", "unbind")
def pick(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """One entry of a dim: of rows that keep their number any, of channels those before it stay."""
    x = propagation.labels(node.args[0])
    assert x is not None
    results = results_without_channels(node)
    position = 2 if isinstance(results, Labels) else 1
    dim = (as_int(node.args[1]) if len(node.args) > 1 else 0) % len(x.shape)
    if dim not in x.varying:
        ids = x.ids.squeeze(dim)
        return (
            [Labels(shape=r.shape, ids=ids) for r in results]
            if isinstance(results, list)
            else Labels(shape=results.shape, ids=ids)
        )
    if not propagation.space.keeps_rows(x, dim):
        return propagation.freeze_inputs(node, f"{node.meta['call'].name or 'select'} picks channels by number")
    if isinstance(results, list):
        for item in node.users:
            index = as_int(item.args[1])
            propagation.parts[item] = Part(dim=dim, start=index, stop=index + 1)
        return [
            compressed(Labels(shape=r.shape, ids=x.ids.take([i], axis=dim).squeeze(dim))) for i, r in enumerate(results)
        ]
    index = as_int(node.args[position]) % x.shape[dim]
    propagation.parts[node] = Part(dim=dim, start=index, stop=index + 1)
    return compressed(Labels(shape=results.shape, ids=x.ids.take([index], axis=dim).squeeze(dim)))


@rule("flip", "roll")
def turn(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Along a dim without channels the labels pass."""
    x = propagation.labels(node.args[0])
    assert x is not None
    dims = node.args[-1] if len(node.args) > (2 if "roll" in str(node.target) else 1) else []
    touched = {int(d) % len(x.shape) for d in dims} if isinstance(dims, list | tuple) else set()  # type: ignore[arg-type]
    if not touched or any(d in touched for d in x.varying):
        return propagation.freeze_inputs(node, f"{node.meta['call'].name or 'roll'} over channels")
    return x
