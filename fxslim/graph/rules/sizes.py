# SPDX-License-Identifier: Apache-2.0
"""Sizes given to a view, split or slice: do they follow when channels go?"""

from typing import Any

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels
from fxslim.graph.propagation import Propagation
from fxslim.graph.size_checks import SizeCheck
from fxslim.graph.tagged_sizes import Attribute, Extent, TaggedInt, expression_of, leaves

# Written down as a number; computed from a tensor's own channels, or left to torch; read from an attribute.
LITERAL, OWN, ATTRIBUTE = "literal", "own", "attribute"


def size_given(node: fx.Node, dim: int) -> Any:
    """What the user's code gave for one dim of a view's result; None if it gave no sizes."""
    call = node.meta["call"]
    if call.sizes is None or node.meta["shape"] is None:
        return None
    if call.name == "unflatten":
        start, sizes = int(call.sizes[0]), call.sizes[1]
        start %= len(node.meta["shape"]) - len(sizes) + 1
        return sizes[dim - start] if start <= dim < start + len(sizes) else None
    return call.sizes[dim] if len(call.sizes) == len(node.meta["shape"]) else None


def size_kind(propagation: Propagation, given: Any) -> str:
    """Whether a size follows by itself, by changing an attribute, or not at all."""
    if given is None or int(given) == -1:
        return OWN
    found = list(leaves(expression_of(given)))
    if any(isinstance(leaf, Extent) and channels_of(propagation, leaf) is not None for leaf in found):
        return OWN
    return ATTRIBUTE if any(isinstance(leaf, Attribute) for leaf in found) else LITERAL


def channels_of(propagation: Propagation, leaf: Extent) -> Ids | None:
    """Labels along the dim whose size was read; None if it has none."""
    if leaf.node.op == "get_attr":
        slot = propagation.slots.get((str(leaf.node.target), leaf.dim))
        return None if slot is None or slot.blocks > 1 else slot.ids
    labels = propagation.values.get(leaf.node)
    if not isinstance(labels, Labels) or leaf.dim not in labels.varying:
        return None
    if propagation.space.keeps_rows(labels, leaf.dim):
        return None
    return labels.line(leaf.dim)


def follow_count(
    propagation: Propagation, node: fx.Node, given: Any, line: Ids, *, parts: int = 1, static: int = 0
) -> None:
    """A size must be the kept entries of ``line`` over ``parts``; other channels that it reads keep equal counts."""
    if not isinstance(given, TaggedInt):
        return
    balance_counts(propagation, node, given, line)
    if parts == 1 and line.size and not static:
        balance_readers(propagation, node, given, line)
    expression = given.expression
    propagation.checks.append(SizeCheck(node=node, expression=expression, ids=line, parts=parts, static=static))


def balance_counts(propagation: Propagation, node: fx.Node, given: Any, line: Ids) -> None:
    """Other channels whose number a size reads keep as many entries as ``line``."""
    for leaf in leaves(given.expression) if isinstance(given, TaggedInt) else ():
        other = channels_of(propagation, leaf) if isinstance(leaf, Extent) else None
        if other is not None and line.size and not np.isin(line, other).any() and line.size % other.size == 0:
            rows = np.concatenate([other[None], line.reshape(-1, other.size)])
            propagation.space.balance(rows, f"a size read at {node.meta['call'].where}")


def balance_readers(propagation: Propagation, node: fx.Node, given: Any, line: Ids) -> None:
    """Channels whose number is read from the same attributes keep equal counts: an attribute has one value."""
    if size_kind(propagation, given) != ATTRIBUTE or any(isinstance(leaf, Extent) for leaf in leaves(given.expression)):
        return
    first = propagation.widths.setdefault(given.expression, line)
    if first.size == line.size and not np.array_equal(first, line):
        propagation.space.balance(np.stack([first, line]), f"a size read at {node.meta['call'].where}")


def check_unlabelled(propagation: Propagation, node: fx.Node, dims: list[int]) -> None:
    """Sizes of dims without channels must stay what they are."""
    for d in dims:
        given = size_given(node, d)
        if isinstance(given, TaggedInt) and size_kind(propagation, given) != LITERAL:
            nothing = np.zeros(0, dtype=np.int64)
            propagation.checks.append(
                SizeCheck(node=node, expression=given.expression, ids=nothing, static=node.meta["shape"][d])
            )


def shown_sizes(sizes: Any) -> str:
    """Sizes as a user wrote them."""
    if isinstance(sizes, tuple):
        return "(" + ", ".join(shown_sizes(size) for size in sizes) + ")"
    return str(int(sizes)) if isinstance(sizes, int) else str(sizes)
