# SPDX-License-Identifier: Apache-2.0
"""Matrix products of two activations: attention, and everything like it."""

import math

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, compressed, fixed
from fxslim.graph.propagation import Propagation, combined, rule
from fxslim.graph.slots import LayerCall

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
    result = _product(propagation, a, b, node.meta["shape"])
    if result is None:
        _count(propagation, node, a, b, None)
        return propagation.freeze_inputs(node, UNCLEAR)
    heads = _batch_ids(a) if _batch_ids(a).size > 1 else _batch_ids(b)
    _count(propagation, node, a, b, heads)
    return result


def _batch_ids(x: Labels) -> Ids:
    """Labels of the batch dims of a value whose channels lie there only."""
    rank = len(x.shape)
    return x.ids.reshape(-1) if all(d < rank - 2 for d in x.varying) else np.zeros(1, dtype=np.int64)


def _product(propagation: Propagation, a: Labels, b: Labels, shape: tuple[int, ...]) -> Labels | None:
    """Labels of the result; None where the operands' channels do not fit together."""
    rank = len(shape)
    if len(a.shape) != rank or len(b.shape) != rank:
        return None
    rows, columns = rank - 2, rank - 1
    batch_a, batch_b = ([d for d in x.varying if d < rows] for x in (a, b))
    if (columns in a.varying) != (rows in b.varying):
        return None
    if columns in a.varying:
        # Both lose the same terms of the sum.
        if rows in a.varying or columns in b.varying or batch_a != batch_b:
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
    if not other.varying and any(
        other.shape[d] > 1 and not propagation.space.keeps_rows(carrier, d) for d in carrier.varying if d < rows
    ):
        # The other operand has entries for each head, but they are no channels.
        return None
    return compressed(Labels(shape=shape, ids=carrier.ids))


def _count(propagation: Propagation, node: fx.Node, a: Labels, b: Labels, heads: Ids | None) -> None:
    """Multiply-adds of one product; they shrink with the heads."""
    macs = math.prod(a.shape) * b.shape[-1] // max(propagation.batch, 1)
    factors: tuple[tuple[str, int], ...] = ()
    if heads is not None and heads.size > 1:
        factors = propagation.slots_of(heads)[:1]
    name = node.meta["module"] or "the model's forward"
    propagation.calls.append(LayerCall(name=name, macs=macs, factors=factors))
