# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers and cells, taken whole: entry i of every gate is one hidden channel."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from fxslim.graph.labels import Ids, Labels, along, compressed
from fxslim.graph.propagation import Propagation, as_int, operator_name, results_without_channels, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
COMPUTED = "the weight of a recurrent layer"


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """One direction of one layer: its matrices, the channels that it puts out and those that it remembers.

    The two are the same unless it projects.
    """

    matrices: list[str]
    out: Ids
    cell: Ids


def _connect(propagation: Propagation, names: list[str], line: Ids, gates: int) -> _Direction:
    """Slots of one direction of one layer (or of a cell) that reads channels ``line``."""
    matrices = [name for name in names if propagation.states[name].dim() == 2]
    out = propagation.slot(matrices[1], 1, role="consumer").ids
    cell = propagation.slot(matrices[2], 1, role="consumer").ids if len(matrices) == 3 else out
    gated = np.tile(cell, gates)
    propagation.slot(matrices[0], 1, line, role="consumer")
    for name in names:
        role = "producer" if name in matrices else "follower"
        propagation.slot(name, 0, out if name in matrices[2:] else gated, role=role)
    return _Direction(matrices=matrices, out=out, cell=cell)


def _names(propagation: Propagation, values: list[Any]) -> list[str] | None:
    """Names of the parameters; None where one is computed or used for two things."""
    names = [propagation.state_name(value) for value in values]
    known = [name for name in names if name is not None]
    return known if len(set(known)) == len(names) else None


def _readable(x: Labels | None) -> bool:
    return x is not None and all(d == len(x.shape) - 1 for d in x.varying)


def _tie_state(propagation: Propagation, node: fx.Node, value: fx.Node, rows: Ids) -> None:
    """The state before the first step has the layer's channels, or keeps them: ``rows`` has those of each layer."""
    module = propagation.modules.get(value.meta.get("module", ""))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and operator_name(value) == "zeros":
        # Made by the layer itself, with the size that it will have.
        return
    labels = propagation.labels(value)
    assert labels is not None
    batch = len(labels.shape) - 2
    ids = labels.ids if batch < 0 else labels.ids.squeeze(batch) if batch not in labels.varying else None
    if ids is None or ids.shape[-1] != rows.shape[-1]:
        propagation.freeze(labels, node, "the first state of a recurrent layer")
        propagation.space.freeze(rows, f"the first state of {node.meta['module']} is given from outside")
    else:
        propagation.space.unify(np.broadcast_to(ids, rows.shape), rows)
        if rows.ndim > 1 and any(np.isin(ids, entries).any() for entries in propagation.entries.values()):
            # A learned state is one tensor, cut alike for all layers.
            propagation.space.unify(np.broadcast_to(rows[:1], rows.shape), rows)


def _count(propagation: Propagation, node: fx.Node, made: _Direction, batch: int, positions: int) -> None:
    for name in made.matrices:
        propagation.count(node, name, batch, positions, ((name, 0), (name, 1)))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def run_layers(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Layers over a sequence; all directions of all layers keep equally many channels."""
    packed = isinstance(node.args[3], list | tuple)
    x, settings = propagation.labels(node.args[0]), node.args[1 + packed :]
    names = _names(propagation, list(settings[1]))  # type: ignore[arg-type]
    if names is None:
        return propagation.freeze_inputs(node, propagation.why_computed(node, COMPUTED))
    if x is None or not _readable(x):
        return propagation.freeze_inputs(node, "a recurrent layer runs over a labelled dim")
    before = list(settings[0]) if isinstance(settings[0], list | tuple) else [settings[0]]
    directions, each = 1 + bool(settings[6]), len(names) // (as_int(settings[3]) * (1 + bool(settings[6])))
    batch, steps = before[0].meta["shape"][1], math.prod(x.shape[:-1])  # type: ignore[union-attr]
    line, done = x.vector(len(x.shape) - 1), list[_Direction]()
    for start in range(0, len(names), each * directions):
        layer = [
            _connect(propagation, names[i : i + each], line, GATES[operator_name(node)])
            for i in range(start, start + each * directions, each)
        ]
        for made in layer:
            _count(propagation, node, made, batch, steps)
        line = np.concatenate([made.out for made in layer])
        done += layer
    rows = [np.stack([made.out for made in done]), np.stack([made.cell for made in done])]
    for each_layer, value in zip(rows, before, strict=False):
        propagation.space.balance(each_layer, f"layers and directions of {node.meta['module']}")
        _tie_state(propagation, node, value, each_layer)  # type: ignore[arg-type]
    return _results(node, line, rows)


def _results(node: fx.Node, line: Ids, rows: list[Ids]) -> list[Labels]:
    """Labels of the sequence and of the last states."""
    results = results_without_channels(node)
    assert isinstance(results, list)
    last = len(results[0].shape) - 1
    labels = [along(results[0].shape, last, line)] if last >= 0 else [results[0]]
    for result, each_layer in zip(results[1:], rows, strict=False):
        labels.append(compressed(Labels(shape=result.shape, ids=each_layer[:, None])) if result.shape else result)
    return labels


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def run_cell(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """One step; a cell that is called again has the same channels."""
    x, before = propagation.labels(node.args[0]), node.args[1]
    names = _names(propagation, [value for value in node.args[2:] if value is not None])
    if names is None:
        return propagation.freeze_inputs(node, propagation.why_computed(node, COMPUTED))
    if x is None or not _readable(x):
        return propagation.freeze_inputs(node, "a recurrent cell runs over a labelled dim")
    last = len(x.shape) - 1
    made = _connect(propagation, names, x.vector(last), GATES[operator_name(node).removesuffix("_cell")])
    for value in before if isinstance(before, list | tuple) else [before]:
        _tie_state(propagation, node, value, made.out)  # type: ignore[arg-type]
    _count(propagation, node, made, x.shape[0], math.prod(x.shape[:-1]))
    results = results_without_channels(node)
    if isinstance(results, list):
        return [along(r.shape, last, made.out) if r.shape else r for r in results]
    return along(results.shape, last, made.out)


@rule("_pack_padded_sequence")
def pack(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Time and batch become one dim."""
    return _repacked(propagation, node, 2, 1)


@rule("_pad_packed_sequence")
def unpack(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """One dim becomes time and batch."""
    return _repacked(propagation, node, 1, 2)


def _repacked(propagation: Propagation, node: fx.Node, before: int, after: int) -> Labels | list[Labels]:
    x, results = propagation.labels(node.args[0]), results_without_channels(node)
    if x is None or not isinstance(results, list) or any(d < before for d in x.varying):
        return propagation.freeze_inputs(node, "sequences packed along a labelled dim")
    ids = x.ids.reshape((1,) * after + x.ids.shape[before:])
    return [Labels(shape=results[0].shape, ids=ids), *results[1:]]
