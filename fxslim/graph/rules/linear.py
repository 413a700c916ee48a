# SPDX-License-Identifier: Apache-2.0
"""Matrix products with a parameter, bilinear layers; products of activations stay whole."""

import math

from torch import fx

from fxslim.graph.labels import Labels, along
from fxslim.graph.propagation import Propagation, as_node, combined, operator_name, rule


def _linear(propagation: Propagation, node: fx.Node, x_node: object, weight: str, out_dim: int) -> Labels | None:
    """x times a parameter whose ``out_dim`` is the output; None where x has no labels."""
    x = propagation.labels(x_node)
    if x is None:
        return None
    last, shape = len(x.shape) - 1, node.meta["shape"]
    x = propagation.tied_along(x, last)
    factors: tuple[tuple[str, int], ...] = ((weight, 0), (weight, 1))
    if x.varying and last not in x.varying:
        # Each channel by itself: the layer mixes positions, and their number stays.
        propagation.freeze_state(weight, node, "a layer mixes positions")
        made, factors = Labels(shape=shape, ids=x.ids), propagation.slots_of(x.ids)[:1]
    else:
        propagation.slot(weight, 1 - out_dim, x.vector(last), role="consumer")
        made = along(shape, last, propagation.slot(weight, out_dim, role="producer").ids)
    propagation.count(node, weight, _batch(x_node), math.prod(x.shape[:-1]), factors)
    return made


def _count_computed(propagation: Propagation, node: fx.Node, x_node: object, weight: object) -> None:
    """The cost of a product whose channels can't be followed: each row meets the whole weight."""
    rows = as_node(x_node).meta["shape"][:-1]
    propagation.count(node, as_node(weight), _batch(x_node), math.prod(rows))


def _batch(x_node: object) -> int:
    """The first size before a linear layer made one dim of batch and positions."""
    while isinstance(x_node, fx.Node) and x_node.op == "call_function" and operator_name(x_node) in ("view", "t"):
        x_node = x_node.args[0]
    shape = x_node.meta["shape"] if isinstance(x_node, fx.Node) else ()
    return shape[0] if len(shape) > 1 else 1


def _out_dim(value: object) -> int:
    """A weight used as it is has its output last; used transposed, first."""
    transposed = 0
    while isinstance(value, fx.Node) and value.op == "call_function":
        transposed, value = transposed + 1, value.args[0]
    return 0 if transposed % 2 else 1


@rule("mm", "matmul")
def multiply(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A linear layer without bias where the second factor is a parameter."""
    weight = propagation.state_name(node.args[1])
    if weight is not None and propagation.states[weight].dim() == 2:
        result = _linear(propagation, node, node.args[0], weight, _out_dim(node.args[1]))
        if result is not None:
            return result
    _count_computed(propagation, node, node.args[0], node.args[1])
    return propagation.freeze_inputs(node, propagation.why_computed(node, "a factor of a matrix product"))


@rule("addmm")
def multiply_and_add(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A linear layer with bias."""
    weight, shape = propagation.state_name(node.args[2]), node.meta["shape"]
    if weight is not None and as_node(node.args[0]).meta["shape"] == shape[-1:]:
        result = _linear(propagation, node, node.args[1], weight, _out_dim(node.args[2]))
        name = propagation.state_name(node.args[0])
        if result is not None and name is not None:
            if weight in propagation.whole:
                propagation.freeze_state(name, node, "a layer mixes positions")
            else:
                propagation.slot(name, 0, result.vector(len(result.shape) - 1))
            return result
        if result is not None:
            # A bias that is put together from several parameters.
            bias = propagation.labels(node.args[0])
            return combined(propagation, node, [result, bias] if bias is not None else [result], shape)
    _count_computed(propagation, node, node.args[1], node.args[2])
    return propagation.freeze_inputs(node, propagation.why_computed(node, "a factor of a matrix product"))


@rule("bilinear")
def multiply_twice(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Reads the channels of two inputs, makes its own."""
    given = [*node.args, *node.kwargs.values()]
    a, b, weight = propagation.labels(given[0]), propagation.labels(given[1]), propagation.state_name(given[2])
    bias = given[3] if len(given) > 3 else None
    if weight is None or a is None or b is None or propagation.has_computed([bias] if bias is not None else []):
        return propagation.freeze_inputs(node, propagation.why_computed(node, "the weight of a bilinear layer"))
    last = len(a.shape) - 1
    if any(d != last for labels in (a, b) for d in labels.varying):
        return propagation.freeze_inputs(node, "a bilinear layer reads channels along another dim than the last")
    propagation.slot(weight, 1, a.vector(last), role="consumer")
    propagation.slot(weight, 2, b.vector(last), role="consumer")
    out = propagation.slot(weight, 0, role="producer").ids
    name = propagation.state_name(bias)
    if name is not None:
        propagation.slot(name, 0, out)
    batch = a.shape[0] if last else 1
    propagation.count(node, weight, batch, math.prod(a.shape[:-1]), ((weight, 0), (weight, 1), (weight, 2)))
    return along(node.meta["shape"], last, out)
