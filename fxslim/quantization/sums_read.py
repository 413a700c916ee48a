# SPDX-License-Identifier: Apache-2.0
"""Whose sums a quantizer puts on its grid: those of layers before it, with nothing between but what kernels fuse."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxslim.nn.quantizers.integer_sums import Channels
from fxslim.quantization.dataflow import Dataflow, operator_of

# Plans hold no longer lists of channels.
_LONGEST_ORDER = 8192
# Concatenations in concatenations: a loop that appends makes hundreds.
_DEEPEST = 3

# The layers, and where the channels of each are.
Sums = tuple[tuple[str, Channels], ...]


def find_sums(
    flow: Dataflow,
    layers: Collection[str],
    norms: Mapping[str, str],
    inputs: Collection[str],
    outputs: Collection[str],
    own: Collection[str],
) -> dict[str, Sums]:
    """{reader: the sums}; readers: ``inputs`` of layers, and ``outputs`` of modules.

    ``norms``: {layer: the batch norm that becomes part of it}; ``own``: layers whose own output is put on a grid.
    """
    made, on_grid = {}, set()
    for call in flow.recording.calls:
        if flow.calls_of[call.name] != 1 or not call.outputs:
            continue
        if call.name in layers and flow.is_product(call.outputs[0]):
            made[flow.source(call.outputs[0])] = call.name
        if call.name in outputs or call.name in own:
            on_grid.add(call.outputs[0])
    walk = _Walk(flow, made, norms, on_grid)
    found = {}
    for call in flow.recording.calls:
        if flow.calls_of[call.name] != 1:
            continue
        if call.name in outputs and len(call.outputs) == 1:
            found[call.name] = walk.back(call.outputs[0])
        elif call.name in inputs and call.inputs:
            found[call.name] = walk.to(call.inputs[0])
    return {reader: sums for reader, sums in found.items() if sums}


@dataclass(frozen=True)
class _Walk:
    """From a tensor back to the layers whose sums it is."""

    flow: Dataflow
    made: Mapping[fx.Node, str]
    norms: Mapping[str, str]
    on_grid: Collection[fx.Node]

    def to(self, node: fx.Node, depth: int = 0) -> Sums:
        """As ``back``, of a tensor that may be on a grid already and then is nobody's sums any more."""
        return () if node in self.on_grid else self.back(node, depth)

    def back(self, node: fx.Node, depth: int = 0) -> Sums:
        """Through moves, clamps, and the norm that becomes part of the layer; ``depth``: of concatenations around."""
        moves, between, clamps = [], [], []
        flow = self.flow
        while node not in self.made:
            if flow.is_norm(node):
                between.append(str(node.meta.get("module")))
            elif flow.is_move(node) or operator_of(node) == "getitem":
                moves.append(node)
            elif flow.is_clamp(node):
                clamps.append(flow.bounds(node))
            elif operator_of(node) == "cat" and not moves and not between and depth < _DEEPEST:
                return _clamped(self._joined(node, depth + 1), clamps)
            else:
                return ()
            if not node.args or not isinstance(node.args[0], fx.Node) or node.args[0] in self.on_grid:
                return ()
            node = node.args[0]
        layer = self.made[node]
        if between != ([self.norms[layer]] if layer in self.norms else []):
            return ()
        channels = _channels(node, moves[::-1])
        return () if channels is None else _clamped(((layer, channels),), clamps)

    def _joined(self, node: fx.Node, depth: int) -> Sums:
        """Of the parts that are sums of a layer, joined along its channels."""
        dims = len(node.meta["shape"])
        dim = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % dims - dims
        found, start = [], 0
        for part in cast(list[fx.Node], node.args[0]):
            if len(part.meta["shape"]) != dims:
                # Torch takes an empty vector for nothing at all.
                continue
            length = part.meta["shape"][dim]
            for layer, channels in self.to(part, depth):
                if channels.dim != dim:
                    continue
                if channels.start is not None:
                    found.append((layer, channels._replace(start=start + channels.start)))
                elif channels.length == length:
                    found.append((layer, channels._replace(start=start)))
            start += length
        return tuple(found)


def _clamped(sums: Sums, clamps: list[tuple[float | None, float | None]]) -> Sums:
    """Cut off at these ends; those that were computed are not known."""
    if any(end is not None and math.isnan(end) for ends in clamps for end in ends):
        return ()
    made = []
    for layer, channels in sums:
        lows, highs = zip((channels.low, channels.high), *clamps, strict=True)
        low, high = max(filter(None, lows), default=None), min(filter(None, highs), default=None)
        made.append((layer, channels._replace(low=low, high=high)))
    return tuple(made)


def _channels(made: fx.Node, moves: list[fx.Node]) -> Channels | None:
    """Where these operators put the channels of what a layer made: its places, labelled, go the same way."""
    shape = made.meta["shape"]
    dim = (1 if operator_of(made) == "convolution" else len(shape) - 1) - len(shape)
    labels = torch.arange(shape[dim], dtype=torch.float32).reshape(-1, *[1] * (-dim - 1)).expand(shape)
    found, turned = _moved(labels, moves), _moved(-labels, moves)
    # The largest of several channels is not known by its label.
    if found is None or turned is None or not torch.equal(found, -turned):
        return None
    return _along_one_dim(found)


def _moved(labels: Any, moves: list[fx.Node]) -> Tensor | None:
    for node in moves:
        name, target = operator_of(node), cast(Any, node.target)
        if name == "getitem":
            # Of a norm's results the first.
            labels = labels[cast(int, node.args[1])] if isinstance(labels, tuple | list) else labels
        elif len(node.all_input_nodes) > 1 or name == "as_strided":
            return None
        elif name != "dropout":
            try:
                labels = target(labels.contiguous(), *node.args[1:], **node.kwargs)
            except (TypeError, RuntimeError):
                # Arguments of which a recording only tells the names.
                return None
    return labels if isinstance(labels, Tensor) else None


def _along_one_dim(labels: Tensor) -> Channels | None:
    """The dim along which labels tell the channel; None where they lie another way."""
    if not labels.numel():
        return None
    if bool((labels == labels.reshape(-1)[:1]).all()):
        return Channels(-1, int(labels.reshape(-1)[0]), 1)
    for dim in range(-1, -labels.dim() - 1, -1):
        row = labels[tuple(slice(None) if place == labels.dim() + dim else 0 for place in range(labels.dim()))]
        if torch.equal(row.reshape(-1, *[1] * (-dim - 1)).expand_as(labels), labels):
            first, repeat = int(row[0]), int((row == row[0]).sum())
            rising = first + torch.arange(len(row)).div(repeat, rounding_mode="floor")
            if torch.equal(row, rising.to(row.dtype)):
                return Channels(dim, first, len(row) // repeat, repeat)
            return Channels(dim, order=tuple(row.int().tolist())) if len(row) <= _LONGEST_ORDER else None
    return None
