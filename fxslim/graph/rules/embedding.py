# SPDX-License-Identifier: Apache-2.0
"""Tables whose rows are looked up."""

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, along, fixed
from fxslim.graph.propagation import Propagation, as_node, operator_name, results_without_channels, rule


@rule("embedding")
def embed(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Rows are looked up, columns are channels."""
    line = _look_up(propagation, node)
    if line is None:
        return propagation.freeze_inputs(node, propagation.why_computed(node, "the table of an embedding"))
    return along(node.meta["shape"], len(node.meta["shape"]) - 1, line)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embed_bags(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Rows are summed in bags, columns are channels; then offsets, sizes and places, which have none."""
    line, results = _look_up(propagation, node), results_without_channels(node)
    if line is None or not isinstance(results, list):
        return propagation.freeze_inputs(node, propagation.why_computed(node, "the table of an embedding"))
    return [along(results[0].shape, 1, line), *results[1:]]


@rule("embedding_renorm")
def renormalise(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A table that the forward changes stays."""
    table = as_node(node.args[0])
    name = propagation.state_name(table.args[0] if operator_name(table) == "detach" else table)
    if name is not None:
        propagation.freeze_state(name, node, "max_norm makes the forward change its table")
    return fixed(node.meta["shape"])


def _look_up(propagation: Propagation, node: fx.Node) -> Ids | None:
    """The labels of a table's columns; None where the table is computed."""
    weight = propagation.state_name(node.args[0])
    if weight is None:
        return None
    for value in node.all_input_nodes:
        if propagation.state_name(value) != weight:
            propagation.freeze(propagation.labels(value), node, "indices or weights of an embedding")
    rows = propagation.slot(weight, 0, np.zeros(propagation.states[weight].shape[0], dtype=np.int64))
    propagation.freeze(Labels(shape=(), ids=rows.ids), node, "rows of an embedding")
    return propagation.slot(weight, 1, role="producer").ids
