# SPDX-License-Identifier: Apache-2.0
"""Convolutions: plain, grouped, depthwise, transposed."""

import math

import numpy as np
from torch import fx
from torch.nn.modules.conv import _ConvNd

from fxslim.graph.labels import Ids, Labels, along, fixed
from fxslim.graph.propagation import Propagation, as_int, as_node, combined, rule
from fxslim.graph.rules.sizes import LITERAL, follow_count, size_kind
from fxslim.graph.slots import owner
from fxslim.graph.tagged_sizes import Attribute, expression_of


@rule("convolution")
def convolve(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Consumes the input's channels, makes fresh ones; depthwise passes them on."""
    x, weight, bias = (propagation.labels(node.args[0]), *map(propagation.state_name, node.args[1:3]))
    transposed, groups = bool(node.args[6]), as_int(node.args[8])
    if weight is None or x is None:
        _count_computed(propagation, node, transposed)
        return propagation.freeze_inputs(node, propagation.why_computed(node, "the weight of a convolution"))
    channel = 1 if len(x.shape) == propagation.states[weight].dim() else 0
    if channel == 1 and 0 in x.varying and (propagation.tie_views(node, x) or propagation.narrow_heads(node, x)):
        # Heads are the batch, and all go through one kernel. Runs again with heads that get narrower alike.
        return fixed(node.meta["shape"])
    if any(d != channel for d in x.varying):
        return propagation.freeze_inputs(node, "a convolution runs over a labelled dim")
    line, shape = x.vector(channel), node.meta["shape"]
    depthwise = groups > 1 and groups == len(line)
    _follow_groups(propagation, node, weight, groups, line)
    if depthwise:
        out = _depthwise(propagation, weight, line, shape[channel], transposed)
    elif groups == 1:
        out = _plain(propagation, weight, line, transposed)
    else:
        out = _grouped(propagation, node, weight, line, groups, transposed)
    if bias is not None:
        propagation.slot(bias, 0, out)
    pixels = x.shape if transposed else shape
    factors = ((weight, 0),) if depthwise else ((weight, 0), (weight, 1))
    batch = x.shape[0] if channel == 1 else 1
    propagation.count(node, weight, batch, math.prod(pixels) // pixels[channel], factors)
    made = along(shape, channel, out)
    if propagation.has_computed(node.args[2:3]):
        return _with_computed_bias(propagation, node, made, channel)
    return made


def _count_computed(propagation: Propagation, node: fx.Node, transposed: bool) -> None:
    """The cost of a convolution whose channels can't be followed."""
    given, weight = as_node(node.args[0]).meta["shape"], as_node(node.args[1])
    channel = 1 if len(given) == len(weight.meta["shape"]) else 0
    pixels = given if transposed else node.meta["shape"]
    positions = math.prod(size for dim, size in enumerate(pixels) if dim != channel)
    propagation.count(node, weight, given[0] if channel == 1 else 1, positions)


def _with_computed_bias(propagation: Propagation, node: fx.Node, made: Labels, channel: int) -> Labels:
    """A bias that the model computes has an entry for each channel."""
    bias = propagation.labels(node.args[2])
    assert bias is not None
    behind = (1,) * (len(made.shape) - channel - 1)
    wide = Labels(shape=bias.shape + behind, ids=bias.ids.reshape(bias.ids.shape + behind))
    return combined(propagation, node, [made, wide], made.shape)


def _follow_groups(propagation: Propagation, node: fx.Node, weight: str, groups: int, line: Ids) -> None:
    """A number of groups that is not a layer's own: as many as channels shrink with them, all others stay."""
    call = node.meta["call"]
    given = call.sizes[0] if groups > 1 and call.sizes else None
    layer = owner(weight)
    own = isinstance(propagation.modules.get(layer), _ConvNd) and Attribute(module=layer, name="groups")
    if given is None or expression_of(given) == own:
        return
    if groups != len(line):
        follow_count(propagation, node, given, line[:0], static=groups)
    elif size_kind(propagation, given) == LITERAL:
        propagation.freeze(Labels(shape=(), ids=line), node, f"{groups} groups written down at {call.where}")
    else:
        follow_count(propagation, node, given, line)


def _plain(propagation: Propagation, weight: str, line: Ids, transposed: bool) -> Ids:
    propagation.slot(weight, 0 if transposed else 1, line, role="consumer")
    return propagation.slot(weight, 1 if transposed else 0, role="producer").ids


def _depthwise(propagation: Propagation, weight: str, line: Ids, made: int, transposed: bool) -> Ids:
    """Each channel makes one or more of its own, which go with it."""
    out = np.repeat(line, made // len(line))
    propagation.slot(weight, 0, line if transposed else out, role="depthwise")
    return out


def _grouped(propagation: Propagation, node: fx.Node, weight: str, line: Ids, groups: int, transposed: bool) -> Ids:
    """The weight's first dim has all channels of one side; its second those of the other side, block by block."""
    where = node.meta["module"]
    if transposed:
        propagation.slot(weight, 0, line, role="consumer")
        out = propagation.slot(weight, 1, blocks=groups, role="producer").ids
    else:
        propagation.slot(weight, 1, line, blocks=groups, role="consumer")
        out = propagation.slot(weight, 0, role="producer").ids
    propagation.group(node, line, groups, f"{groups} groups read by {where}")
    propagation.space.balance(out.reshape(groups, -1), f"{groups} groups made by {where}")
    return out
