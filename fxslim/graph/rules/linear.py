# SPDX-License-Identifier: Apache-2.0
"""Matrix products with a parameter, embeddings; products of activations stay whole."""

import math

import numpy as np
from torch import fx

from fxslim.graph.labels import Labels, along
from fxslim.graph.propagation import Propagation, rule


def _linear(propagation: Propagation, node: fx.Node, x_node: object, weight: str, out_dim: int) -> Labels | None:
    """x times a parameter whose ``out_dim`` is the output; None where x's labels are not in its last dim."""
    x = propagation.labels(x_node)
    if x is None or any(d != len(x.shape) - 1 for d in x.varying):
        return None
    propagation.slot(weight, 1 - out_dim, x.vector(len(x.shape) - 1), role="consumer")
    out = propagation.slot(weight, out_dim, role="producer").ids
    propagation.count(node, weight, x, math.prod(x.shape[:-1]), ((weight, 0), (weight, 1)))
    return along(node.meta["shape"], len(node.meta["shape"]) - 1, out)


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
    return propagation.freeze_inputs(node, "matrix product of activations")


@rule("addmm")
def multiply_and_add(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A linear layer with bias."""
    bias, weight = propagation.state_name(node.args[0]), propagation.state_name(node.args[2])
    if bias is not None and weight is not None and propagation.states[bias].shape == node.meta["shape"][-1:]:
        result = _linear(propagation, node, node.args[1], weight, _out_dim(node.args[2]))
        if result is not None:
            propagation.slot(bias, 0, result.vector(len(result.shape) - 1))
            return result
    return propagation.freeze_inputs(node, "matrix product of activations")


@rule("embedding")
def embed(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Rows are looked up, columns are channels."""
    weight, indices = propagation.state_name(node.args[0]), propagation.labels(node.args[1])
    if weight is None:
        return propagation.freeze_inputs(node, "embedding of an activation")
    propagation.freeze(indices, node, "indices of an embedding")
    rows = propagation.slot(weight, 0, np.zeros(propagation.states[weight].shape[0], dtype=np.int64))
    propagation.freeze(Labels(shape=(), ids=rows.ids), node, "rows of an embedding")
    out = propagation.slot(weight, 1, role="producer").ids
    return along(node.meta["shape"], len(node.meta["shape"]) - 1, out)
