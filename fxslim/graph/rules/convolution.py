# SPDX-License-Identifier: Apache-2.0
"""Convolutions: plain, grouped, depthwise, transposed."""

import math

from torch import fx

from fxslim.graph.labels import Ids, Labels, along
from fxslim.graph.propagation import Propagation, as_int, rule


@rule("convolution")
def convolve(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Consumes the input's channels, makes fresh ones; depthwise passes them on."""
    x, weight, bias = (propagation.labels(node.args[0]), *map(propagation.state_name, node.args[1:3]))
    transposed, groups = bool(node.args[6]), as_int(node.args[8])
    if weight is None or x is None or propagation.has_computed(node.args[2:3]):
        return propagation.freeze_inputs(node, "the weight or bias of a convolution is computed")
    channel = 1 if len(x.shape) == propagation.states[weight].dim() else 0
    if any(d != channel for d in x.varying):
        return propagation.freeze_inputs(node, "a convolution runs over a labelled dim")
    line, shape = x.vector(channel), node.meta["shape"]
    depthwise = groups > 1 and groups == len(line) == shape[channel]
    if depthwise:
        out = _depthwise(propagation, weight, line)
    elif groups == 1:
        out = _plain(propagation, weight, line, transposed)
    elif transposed:
        return propagation.freeze_inputs(node, "grouped transposed convolution")
    else:
        out = _grouped(propagation, node, weight, line, groups)
    if bias is not None:
        propagation.slot(bias, 0, out)
    pixels = x.shape if transposed else shape
    factors = ((weight, 0),) if depthwise else ((weight, 0), (weight, 1))
    propagation.count(node, weight, x, math.prod(pixels) // pixels[channel], factors)
    return along(shape, channel, out)


def _plain(propagation: Propagation, weight: str, line: Ids, transposed: bool) -> Ids:
    propagation.slot(weight, 0 if transposed else 1, line, role="consumer")
    return propagation.slot(weight, 1 if transposed else 0, role="producer").ids


def _depthwise(propagation: Propagation, weight: str, line: Ids) -> Ids:
    propagation.slot(weight, 0, line, role="depthwise")
    return line


def _grouped(propagation: Propagation, node: fx.Node, weight: str, line: Ids, groups: int) -> Ids:
    where = node.meta["module"]
    propagation.slot(weight, 1, line, blocks=groups, role="consumer")
    out = propagation.slot(weight, 0, role="producer").ids
    propagation.space.balance(line.reshape(groups, -1), f"{groups} groups read by {where}")
    propagation.space.balance(out.reshape(groups, -1), f"{groups} groups made by {where}")
    return out
