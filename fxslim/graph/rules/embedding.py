# SPDX-License-Identifier: Apache-2.0
"""Tables whose rows are looked up."""

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, along
from fxslim.graph.propagation import Propagation, results_without_channels, rule


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
    """The forward writes to the table itself."""
    return propagation.freeze_inputs(node, "max_norm scales the rows of a table by all their columns")


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
