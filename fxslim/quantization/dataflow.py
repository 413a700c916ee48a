# SPDX-License-Identifier: Apache-2.0
"""What quantization asks of a recorded forward: who makes a tensor, who reads it, and what leaves its grid alone."""

import math
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

from torch import fx

from fxslim.graph.recording import ModuleCall, Recording

# These move values, or pick some of them: what was on a grid stays on it.
_MOVES = frozenset(
    """
    view _unsafe_view reshape permute transpose t flatten expand contiguous clone alias detach unsqueeze squeeze slice
    select split split_with_sizes chunk unbind getitem max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices dropout roll flip index_select unfold pixel_shuffle pixel_unshuffle channel_shuffle
    upsample_nearest2d native_channel_shuffle as_strided
    """.split()
)
# Of these, the ones that keep all values.
_VIEWS = frozenset("view _unsafe_view reshape permute transpose t flatten contiguous clone unsqueeze squeeze".split())
_PRODUCTS = frozenset("convolution addmm mm bmm baddbmm matmul linear".split())
_CLAMPS = frozenset(("relu", "hardtanh", "clamp", "clamp_min", "relu6"))
_NORMS = frozenset(("native_batch_norm", "batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"))
_SUMS = frozenset(("add", "sub", "mul"))
_POOLS = frozenset(("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean"))
_NOT_NEGATIVE = frozenset(("relu", "relu6", "sigmoid", "_softmax", "softmax", "hardsigmoid"))


def operator_of(node: fx.Node) -> str:
    """The name of a node's operator, in-place ones like the others.

    >>> graph = fx.Graph()
    >>> operator_of(graph.placeholder("x"))
    ''
    """
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(packet, "__name__", ""))
    return name if name.startswith("__") else name.rstrip("_")


class Dataflow:
    """The tensors of one forward, and the modules at whose edges they are."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.calls_of = Counter(call.name for call in recording.calls)
        # The innermost module that gives a tensor, among those that are called once.
        self.givers: dict[fx.Node, ModuleCall] = {}
        for call in recording.calls:
            if len(call.outputs) == 1 and self.calls_of[call.name] == 1 and call.outputs[0] not in call.inputs:
                for node in self._same_values(call.outputs[0]):
                    self.givers.setdefault(node, call)

    def _same_values(self, node: fx.Node) -> Iterable[fx.Node]:
        """The tensor, and those that are read by nothing but the moves which it came by."""
        yield node
        while operator_of(node) in _VIEWS and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1:
            node = node.args[0]
            yield node

    def norm_behind(self, call: ModuleCall) -> str | None:
        """The batch norm that alone reads what a module gave, where both are called once."""
        node = call.outputs[0] if len(call.outputs) == 1 else None
        # What a hook made of a result, and what the model returns besides, stay what they are.
        if node is None or node in self.recording.outputs or not self.is_product(node):
            return None
        readers = readers_of(node)
        if len(readers) != 1 or operator_of(readers[0]) not in _NORMS or readers[0].args[0] is not node:
            return None
        name = str(readers[0].meta.get("module") or "")
        return name if name and self.calls_of[name] == 1 and self.calls_of[call.name] == 1 else None

    def is_product(self, node: fx.Node) -> bool:
        """Whether a layer's arithmetic gave it, at once or moved."""
        return operator_of(self.source(node)) in _PRODUCTS

    def is_norm(self, node: fx.Node) -> bool:
        """Whether it is what a batch norm does."""
        return operator_of(node) in _NORMS

    def is_clamp(self, node: fx.Node) -> bool:
        """Whether it only cuts off values at two ends."""
        return operator_of(node) in _CLAMPS

    def bounds(self, node: fx.Node) -> tuple[float | None, float | None]:
        """The two ends of a clamp. What was computed is NaN."""
        name = operator_of(node)
        if name in ("relu", "relu6"):
            return 0.0, 6.0 if name == "relu6" else None
        given: dict[str, Any] = {"min": None, "max": None} if name != "hardtanh" else {"min_val": -1.0, "max_val": 1.0}
        given |= dict(zip(given, node.args[1:], strict=False)) | node.kwargs
        low, high = (math.nan if isinstance(end, fx.Node) else end for end in given.values())
        return low, high

    def is_move(self, node: fx.Node) -> bool:
        """Whether it moves values, or picks some of them."""
        return operator_of(node) in _MOVES

    def source(self, node: fx.Node) -> fx.Node:
        """The tensor that this one is a moved part of."""
        while operator_of(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return _value(node)

    def is_held(self, node: fx.Node, on_grid: Container[fx.Node]) -> bool:
        """Whether a tensor, or all that it is moved and joined into, is on a grid."""
        if node in on_grid:
            return True
        readers = readers_of(node)
        joined = all(operator_of(reader) in _MOVES or operator_of(reader) == "cat" for reader in readers)
        return bool(readers) and joined and all(self.is_held(_value(reader), on_grid) for reader in readers)

    def settled(self, node: fx.Node) -> fx.Node:
        """The tensor after a norm that can be folded, and after a clamp that the range can hold."""
        node = _value(node)
        readers = readers_of(node)
        if len(readers) == 1 and operator_of(readers[0]) in _NORMS and readers[0].args[0] is node:
            node = _value(readers[0])
            readers = readers_of(node)
        if len(readers) == 1 and operator_of(readers[0]) in _CLAMPS:
            return readers[0]
        return node

    def is_data(self, node: fx.Node) -> bool:
        """Whether no parameter or buffer has a part in it: it is the model's input, perhaps scaled."""
        seen, waiting = {node}, [node]
        while waiting:
            one = waiting.pop()
            if one.op == "get_attr":
                return False
            waiting += [given for given in one.all_input_nodes if given not in seen]
            seen.update(one.all_input_nodes)
        return True

    def is_not_negative(self, node: fx.Node) -> bool:
        """Whether no value is below 0, as far as operators tell."""
        node = self.source(node)
        name = operator_of(node)
        if name in ("hardtanh", "clamp", "clamp_min"):
            return len(node.args) > 1 and isinstance(node.args[1], int | float) and node.args[1] >= 0
        if name in _POOLS:
            return isinstance(node.args[0], fx.Node) and self.is_not_negative(node.args[0])
        return name in _NOT_NEGATIVE

    def sums(self) -> Iterable[tuple[fx.Node, list[fx.Node]]]:
        """Sums, differences and products of two activations, with both."""
        for node in self.recording.nodes:
            if operator_of(node) in _SUMS:
                given = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
                if len(given) == 2 and all(self._is_activation(arg) for arg in given):
                    yield node, given

    def joins(self) -> Iterable[tuple[fx.Node, list[fx.Node]]]:
        """Tensors put together from several."""
        for node in self.recording.nodes:
            parts = node.args[0] if operator_of(node) == "cat" and node.args else ()
            given = [arg for arg in parts if isinstance(arg, fx.Node)] if isinstance(parts, list | tuple) else []
            if len(given) > 1 and all(self._is_activation(arg) for arg in given):
                yield node, given

    def pools(self) -> Iterable[tuple[fx.Node, list[fx.Node]]]:
        """Averages over places."""
        for node in self.recording.nodes:
            given = node.args[0] if operator_of(node) in _POOLS else None
            if isinstance(given, fx.Node) and len(given.meta.get("shape") or ()) >= 3:
                yield node, [given]

    def _is_activation(self, node: fx.Node) -> bool:
        """Computed from the inputs, and not a number."""
        source = self.source(node)
        return source.op != "get_attr" and source.name != "constant" and bool(node.meta.get("shape"))


def _value(node: fx.Node) -> fx.Node:
    """Of an operator with several results the first."""
    if node.meta.get("shape", ()) is None:
        for user in node.users:
            if operator_of(user) == "getitem" and user.args[1] == 0:
                return user
    return node


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The operators that read a tensor, without results of theirs that nothing uses."""
    return [
        user for user in node.users if not (operator_of(user) == "getitem" and not user.users and user.args[1] != 0)
    ]
