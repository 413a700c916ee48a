# SPDX-License-Identifier: Apache-2.0
"""Sizes given to a view, split or slice: do they follow when channels go?"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, along, fixed
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
        name = str(leaf.node.target)
        if name in propagation.entries:
            ids = propagation.entries[name]
            return Labels(shape=ids.shape, ids=ids).line(leaf.dim)
        slot = propagation.slots.get((name, leaf.dim))
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


def repeated(propagation: Propagation, node: fx.Node, dims: Iterable[int]) -> Labels:
    """Labels of a value that repeats one entry along each of these dims: where a size follows, any entry may go."""
    shape, call = node.meta["shape"], node.meta["call"]
    given = {d: size_given(node, d) for d in dims if shape[d] > 1}
    for d, size in given.items():
        expression = size.expression if isinstance(size, TaggedInt) else None
        ids = channels_of(propagation, expression) if isinstance(expression, Extent) else None
        if ids is not None:
            return along(shape, d, ids)
    # Torch repeats the heads of keys and values as often as the queries need.
    attends = call.name == "scaled_dot_product_attention"
    followed = [d for d, size in given.items() if _follows_alone(propagation, size) or (size is None and attends)]
    if len(followed) != 1:
        return fixed(shape)
    ids = propagation.space.fresh(shape[followed[0]])
    follow_count(propagation, node, given[followed[0]], ids)
    return along(shape, followed[0], ids)


def _follows_alone(propagation: Propagation, given: Any) -> bool:
    """Whether attributes of the user's modules give a size; those of torch's own layers are not ours to choose."""
    if given is None or size_kind(propagation, given) != ATTRIBUTE:
        return False
    owners = [propagation.modules[leaf.module] for leaf in leaves(expression_of(given)) if isinstance(leaf, Attribute)]
    return not any(type(owner).__module__.startswith("torch.") for owner in owners)


def balance_counts(propagation: Propagation, node: fx.Node, given: Any, line: Ids) -> None:
    """Other channels whose number a size reads keep as many entries as ``line``."""
    for leaf in leaves(given.expression) if isinstance(given, TaggedInt) else ():
        other = channels_of(propagation, leaf) if isinstance(leaf, Extent) else None
        if other is not None and line.size and not np.isin(line, other).any() and line.size % other.size == 0:
            # Each channel may have become several entries side by side (unfold).
            one = line[:: line.size // other.size]
            repeats = np.array_equal(line, np.repeat(one, line.size // other.size))
            rows = np.concatenate([other[None], one[None] if repeats else line.reshape(-1, other.size)])
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
