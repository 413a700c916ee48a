# SPDX-License-Identifier: Apache-2.0
"""Whose sums a quantizer puts on its grid: those of a layer before it, with nothing between but what kernels fuse."""

import math
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxslim.nn.quantizers.integer_sums import Channels
from fxslim.quantization.dataflow import Dataflow, operator_of


def find_sums(
    flow: Dataflow,
    layers: Collection[str],
    norms: Mapping[str, str],
    inputs: Collection[str],
    outputs: Collection[str],
) -> dict[str, tuple[str, Channels]]:
    """{reader: the layer and where its channels are}; readers: ``inputs`` of layers, and ``outputs`` of modules.

    ``norms``: {layer: the batch norm that becomes part of it}.
    """
    made = {}
    for call in flow.recording.calls:
        if call.name in layers and flow.calls_of[call.name] == 1 and call.outputs and flow.is_product(call.outputs[0]):
            made[flow.source(call.outputs[0])] = call.name
    found = {}
    for call in flow.recording.calls:
        if flow.calls_of[call.name] != 1:
            continue
        if call.name in outputs and len(call.outputs) == 1:
            found[call.name] = _read(flow, call.outputs[0], made, norms)
        elif call.name in inputs and call.inputs:
            found[call.name] = _read(flow, call.inputs[0], made, norms)
    return {reader: sums for reader, sums in found.items() if sums is not None}


def _read(
    flow: Dataflow, node: fx.Node, made: Mapping[fx.Node, str], norms: Mapping[str, str]
) -> tuple[str, Channels] | None:
    """Through moves, clamps, and the norm that becomes part of the layer."""
    moves, between, clamps = [], [], []
    while node not in made:
        if flow.is_norm(node):
            between.append(str(node.meta.get("module")))
        elif flow.is_move(node) or operator_of(node) == "getitem":
            moves.append(node)
        elif flow.is_clamp(node):
            clamps.append(flow.bounds(node))
        else:
            return None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    layer = made[node]
    if between != ([norms[layer]] if layer in norms else []):
        return None
    channels = _channels(node, moves[::-1])
    if channels is None or any(end is not None and math.isnan(end) for ends in clamps for end in ends):
        return None
    low = max((low for low, _ in clamps if low), default=None)
    high = min((high for _, high in clamps if high), default=None)
    return layer, channels._replace(low=low, high=high)


def _channels(made: fx.Node, moves: list[fx.Node]) -> Channels | None:
    """Where these operators put the channels of what a layer made: its places, labelled, go the same way."""
    shape = made.meta["shape"]
    dim = (1 if operator_of(made) == "convolution" else len(shape) - 1) - len(shape)
    labels: Any = torch.arange(shape[dim], dtype=torch.float32).reshape(-1, *[1] * (-dim - 1)).expand(shape)
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
    return _along_one_dim(labels) if isinstance(labels, Tensor) else None


def _along_one_dim(labels: Tensor) -> Channels | None:
    """The dim along which labels rise one by one; None where they lie another way."""
    if not labels.numel():
        return None
    if bool((labels == labels.reshape(-1)[:1]).all()):
        return Channels(-1, int(labels.reshape(-1)[0]), 1)
    for dim in range(-1, -labels.dim() - 1, -1):
        row = labels[tuple(slice(None) if place == labels.dim() + dim else 0 for place in range(labels.dim()))]
        if torch.equal(row.reshape(-1, *[1] * (-dim - 1)).expand_as(labels), labels):
            first, repeat = int(row[0]), int((row == row[0]).sum())
            rising = first + torch.arange(len(row)).div(repeat, rounding_mode="floor")
            found = Channels(dim, first, len(row) // repeat, repeat)
            return found if torch.equal(row, rising.to(row.dtype)) else None
    return None
