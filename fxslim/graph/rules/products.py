# SPDX-License-Identifier: Apache-2.0
"""Matrix products of two activations: attention, and everything like it."""

import math

import numpy as np
from torch import fx

from fxslim.graph.conflicts import Conflict
from fxslim.graph.labels import FIXED, Ids, Labels, compressed, fixed
from fxslim.graph.propagation import Propagation, as_node, combined, operator_name, rule
from fxslim.graph.slots import LayerCall

SHARED = "one head is shared by all queries, whose heads go: its width stays"
UNCLEAR = "matrix product of activations along different channels"


@rule("bmm")
def multiply_batches(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Rows and columns pass, the dim that is summed over is unified, heads in the batch dim are unified."""
    return multiply_activations(propagation, node, node.args[0], node.args[1])


@rule("baddbmm")
def multiply_and_add_batches(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A product, and something with its channels."""
    result = multiply_activations(propagation, node, node.args[1], node.args[2])
    added = propagation.labels(node.args[0])
    if not isinstance(result, Labels) or added is None:
        return propagation.freeze_inputs(node, UNCLEAR)
    if node.kwargs.get("beta", 1) == 0:
        return result
    return combined(propagation, node, [result, added], node.meta["shape"])


def multiply_activations(propagation: Propagation, node: fx.Node, left: object, right: object) -> Labels | list[Labels]:
    """Labels of ``left @ right``."""
    a, b = propagation.labels(left), propagation.labels(right)
    if a is None or b is None:
        return propagation.freeze_inputs(node, UNCLEAR)
    if not a.labelled and not b.labelled:
        _count(propagation, node, a, b, None)
        return fixed(node.meta["shape"])
    a, b = _without_heads(propagation, node, a, b)
    result = _product(propagation, a, b, node.meta["shape"], (_is_repeated(left), _is_repeated(right)))
    if result is None and (propagation.narrow_heads(node, a, b) or propagation.narrow_heads(node, b, a)):
        # Heads of one operand are narrower already: runs again with those of both.
        return fixed(node.meta["shape"])
    if result is None and not _wish_single(propagation, a, b):
        a, b = _without_shared(propagation, node, a, b)
        result = _product(propagation, a, b, node.meta["shape"], (_is_repeated(left), _is_repeated(right)))
    if result is None:
        _count(propagation, node, a, b, None)
        return propagation.freeze_inputs(node, UNCLEAR)
    _count(propagation, node, a, b, a.ids if a.labelled else b.ids)
    return result


def _wish_single(propagation: Propagation, a: Labels, b: Labels) -> bool:
    """Where heads meet the width of a head that is the only one, that one stays and the others are free."""
    inner = len(a.shape) - 2
    for heads, width in ((a, b), (b, a)):
        if not heads.varying or not width.varying or heads.varying[-1] >= inner or width.varying[0] < inner:
            continue
        if not any(np.isin(heads.ids, ids).any() for ids in propagation.heads.values()):
            continue
        source = next((node for node, x in propagation.values.items() if _makes_part(node, x, width)), None)
        if source is not None:
            propagation.wishes.append(Conflict(reason=SHARED, single=(source,)))
            return True
    return False


def _makes_part(node: fx.Node, x: Labels | list[Labels], of: Labels) -> bool:
    """Whether an operator's result has channels of another value only."""
    return node.op == "call_function" and isinstance(x, Labels) and x.labelled and bool(np.isin(x.ids, of.ids).all())


def _without_shared(propagation: Propagation, node: fx.Node, a: Labels, b: Labels) -> tuple[Labels, Labels]:
    """The operands, where heads that are rows meet the width of one head that all share: it stays."""
    rank = len(a.shape)
    if len(b.shape) != rank or propagation.decisions.heads == "dim":
        return a, b
    heads_a, heads_b = (bool(x.varying) and all(d < rank - 1 for d in x.varying) for x in (a, b))
    if heads_a and b.varying in ([rank - 2], [rank - 1]):
        propagation.freeze(b, node, SHARED)
        return a, fixed(b.shape)
    if heads_b and rank - 2 not in b.varying and a.varying == [rank - 1]:
        propagation.freeze(a, node, SHARED)
        return fixed(a.shape), b
    return a, b


def _without_heads(propagation: Propagation, node: fx.Node, a: Labels, b: Labels) -> tuple[Labels, Labels]:
    """The operands; where heads get narrower all of them stay, and so do tables with an entry for each."""
    rank = len(a.shape)
    if len(b.shape) != rank or propagation.decisions.heads != "dim":
        return a, b
    for x in (a, b):
        if x.varying and all(d < rank - 2 for d in x.varying):
            propagation.freeze(x, node, "heads stay where each gets narrower")
    a, b = (fixed(x.shape) if x.varying and max(x.varying) < rank - 2 else x for x in (a, b))
    return a, b


def _is_repeated(value: object) -> bool:
    """Whether the product itself repeats an operand for all heads, so that it follows when heads go."""
    while isinstance(value, fx.Node) and operator_name(value) in ("view", "_unsafe_view", "reshape", "clone"):
        value = value.args[0]
    if not isinstance(value, fx.Node) or operator_name(value) != "expand" or value.meta["call"].sizes is not None:
        return False
    before = as_node(value.args[0]).meta["shape"]
    shape = value.meta["shape"]
    return (1,) * (len(shape) - len(before)) + before != shape


def _product(
    propagation: Propagation, a: Labels, b: Labels, shape: tuple[int, ...], repeated: tuple[bool, bool]
) -> Labels | None:
    """Labels of the result; None where the operands' channels do not fit together."""
    rank = len(shape)
    if len(a.shape) != rank or len(b.shape) != rank:
        return None
    rows, columns = rank - 2, rank - 1
    if columns in a.varying and rows in b.varying:
        # Rows that are summed over the same dim lose the same entries of it.
        a = propagation.tied_along(a, columns) if rows in a.varying else a
        b = propagation.tied_along(b, rows) if columns in b.varying else b
    batch_a, batch_b = ([d for d in x.varying if d < rows] for x in (a, b))
    if (columns in a.varying) != (rows in b.varying):
        return None
    if columns in a.varying:
        # Both lose the same terms of the sum; one that is the same for all heads ties them.
        if batch_a and batch_b and batch_a != batch_b:
            return None
        propagation.space.unify(a.ids, np.swapaxes(b.ids, rows, columns))
        return fixed(shape)
    if a.varying and b.varying and not (batch_a and batch_b):
        return None
    if batch_a and batch_b:
        if batch_a != batch_b or rows in a.varying or columns in b.varying:
            return None
        propagation.space.unify(a.ids, b.ids)
    carrier, other = (a, b) if a.varying else (b, a)
    if not (other.varying or repeated[carrier is a]) and any(
        other.shape[d] > 1 and not propagation.space.keeps_rows(carrier, d) for d in carrier.varying if d < rows
    ):
        # The other operand has entries for each head, but they are no channels.
        return None
    return compressed(Labels(shape=shape, ids=carrier.ids))


def _count(propagation: Propagation, node: fx.Node, a: Labels, b: Labels, ids: Ids | None) -> None:
    """Multiply-adds of one product; they shrink with the heads, or their width."""
    macs = math.prod(a.shape) * b.shape[-1] // max(propagation.batch, 1)
    factors: tuple[tuple[str, int], ...] = ()
    if ids is not None and ids.any():
        factors = propagation.slots_of(ids[ids != FIXED][:1])[:1]
    name = node.meta["module"] or "the model's forward"
    propagation.calls.append(LayerCall(name=name, macs=macs, factors=factors))
