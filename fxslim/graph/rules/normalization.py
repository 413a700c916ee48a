# SPDX-License-Identifier: Apache-2.0
"""Norms: one value per channel follows it."""

import numpy as np
from torch import fx

from fxslim.graph.labels import Labels, fixed
from fxslim.graph.propagation import Propagation, as_int, results_without_channels, rule


def _with_statistics(node: fx.Node, labels: Labels) -> Labels | list[Labels]:
    results = results_without_channels(node)
    if isinstance(results, list):
        results[0] = labels
        return results
    return labels


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Weight, bias and running statistics follow the channels in dim 1."""
    x = propagation.labels(node.args[0])
    if x is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "batch norm over another dim than its channels")
    if propagation.has_computed(node.args[1:5]):
        return propagation.freeze_inputs(node, "batch norm with computed values")
    for value in node.args[1:5]:
        name = propagation.state_name(value)
        if name is not None and propagation.states[name].dim() == 1:
            propagation.slot(name, 0, x.vector(1))
    return _with_statistics(node, x)


@rule("native_group_norm")
def group_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Statistics are made over equally many channels in each group."""
    x = propagation.labels(node.args[0])
    if x is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "group norm over another dim than its channels")
    if propagation.has_computed(node.args[1:3]) or propagation.state_name(node.args[1]) is None:
        return propagation.freeze_inputs(node, "group norm without a weight of its own")
    for value in node.args[1:3]:
        name = propagation.state_name(value)
        if name is not None:
            propagation.slot(name, 0, x.vector(1))
    groups = as_int(node.args[6])
    propagation.space.balance(x.vector(1).reshape(groups, -1), f"{groups} groups normalised by {node.meta['module']}")
    return _with_statistics(node, x)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Statistics over the last dims; weight and bias follow the one that has channels."""
    x = propagation.labels(node.args[0])
    if x is None:
        return results_without_channels(node)
    normalized = len(node.args[1])  # type: ignore[arg-type]
    inside = [d - (len(x.shape) - normalized) for d in x.varying if d >= len(x.shape) - normalized]
    if inside and (normalized != 1 or len(x.varying) != 1):
        return propagation.freeze_inputs(node, "layer norm over several dims")
    if inside and propagation.has_computed(node.args[2:4]):
        return propagation.freeze_inputs(node, "layer norm with computed values")
    if inside and all(propagation.state_name(value) is None for value in node.args[2:4]):
        return propagation.freeze_inputs(node, "layer norm without weight")
    for value in node.args[2:4]:
        name = propagation.state_name(value)
        if name is not None and inside:
            propagation.slot(name, 0, x.vector(x.varying[0]))
    return _with_statistics(node, x)


@rule("_prelu_kernel", "prelu")
def prelu(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """One slope for all, or one that follows each channel."""
    x, slope = propagation.labels(node.args[0]), propagation.labels(node.args[1])
    if x is None or slope is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "prelu over another dim than its channels")
    if slope.labelled:
        propagation.space.unify(x.vector(1), slope.ids.reshape(-1))
    elif np.prod(slope.shape) > 1:
        propagation.freeze(x, node, "prelu with a computed slope")
    return x


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """A computed weight is not followed."""
    propagation.freeze_inputs(node, "weight norm")
    results = results_without_channels(node)
    return results if isinstance(results, list) else fixed(node.meta["shape"])
