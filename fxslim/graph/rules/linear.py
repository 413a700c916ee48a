# SPDX-License-Identifier: Apache-2.0
"""Matrix products with a parameter, bilinear layers; products of activations stay whole."""

import math

from torch import fx

from fxslim.graph.labels import Labels, along
from fxslim.graph.propagation import Propagation, as_node, operator_name, rule


def _linear(propagation: Propagation, node: fx.Node, x_node: object, weight: str, out_dim: int) -> Labels | None:
    """x times a parameter whose ``out_dim`` is the output; None where x's labels are not in its last dim."""
    x = propagation.labels(x_node)
    if x is None:
        return None
    x = propagation.tied_along(x, len(x.shape) - 1)
    if any(d != len(x.shape) - 1 for d in x.varying):
        return None
    propagation.slot(weight, 1 - out_dim, x.vector(len(x.shape) - 1), role="consumer")
    out = propagation.slot(weight, out_dim, role="producer").ids
    propagation.count(node, weight, _batch(x_node), math.prod(x.shape[:-1]), ((weight, 0), (weight, 1)))
    return along(node.meta["shape"], len(node.meta["shape"]) - 1, out)


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
    return propagation.freeze_inputs(node, propagation.why_computed(node, "a factor of a matrix product"))


@rule("addmm")
def multiply_and_add(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A linear layer with bias; a computed one (with parts set to 0) has the channels of what it was made from."""
    weight, name = propagation.state_name(node.args[2]), propagation.state_name(node.args[0])
    bias = None if name is not None else propagation.labels(node.args[0])
    known = name is not None or (bias is not None and bias.labelled)
    if weight is not None and known and as_node(node.args[0]).meta["shape"] == node.meta["shape"][-1:]:
        result = _linear(propagation, node, node.args[1], weight, _out_dim(node.args[2]))
        if result is not None:
            out = result.vector(len(result.shape) - 1)
            if name is not None:
                propagation.slot(name, 0, out)
            elif bias is not None:
                propagation.space.unify(bias.vector(0), out)
            return result
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
