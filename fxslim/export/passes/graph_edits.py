# SPDX-License-Identifier: Apache-2.0
"""Reading and editing the graph of an ONNX file; the one place of this package that makes nodes and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Who reads a value, and as which input, in a fixed order."""
    return [(use.node, use.idx) for use in value.uses()]


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """What a constant holds: an initializer, or the result of Constant; None for what is computed or given."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def dims_of(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """Sizes of a value: numbers, or names, or None where nothing is known of one; None without a rank."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


class GraphEdit:
    """Edits of one graph, with names that are new to it.

    What is made is written right behind or before a node that exists: the order stays one in which inputs come first.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._names = {value.name for node in model.graph for value in node.outputs}
        self._names |= {value.name for value in model.graph.inputs} | set(model.graph.initializers)
        self._node_names = {node.name for node in model.graph}
        self.changed = False

    def _new_name(self, stem: str, taken: set[str | None]) -> str:
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        return name

    def constant(self, array: np.ndarray, stem: str) -> ir.Value:
        """A new initializer."""
        import onnx_ir as ir

        name = self._new_name(stem, self._names)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self.changed = True
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        behind: ir.Node | None = None,
        before: ir.Node | None = None,
        like: ir.Value | None = None,
        stem: str,
    ) -> ir.Value:
        """A new node with one result, which has the shape and the type of ``like``; at the start if nothing is said."""
        import onnx_ir as ir

        result = ir.Value(name=self._new_name(stem, self._names))
        if like is not None:
            result.shape, result.type = like.shape, like.type
        made = ir.Node(
            "",
            operator,
            list(inputs),
            ir.convenience.convert_attributes(dict(attributes or {})),
            outputs=[result],
            name=self._new_name(f"node_{stem}", self._node_names),
        )
        if behind is not None:
            self.graph.insert_after(behind, made)
        elif before is not None:
            self.graph.insert_before(before, made)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], made)
        else:
            self.graph.append(made)
        self.changed = True
        return result

    def hand_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let all who read one value read another; a result of the graph keeps its name."""
        if old.is_graph_output():
            name = old.name
            old.name = self._new_name(f"{name}_inner", self._names)
            new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.changed = True

    def remove(self, node: ir.Node) -> None:
        """Take out a node whose results nobody reads."""
        self.graph.remove(node, safe=True)
        self.changed = True
