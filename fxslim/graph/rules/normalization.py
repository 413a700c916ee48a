# SPDX-License-Identifier: Apache-2.0
"""Norms: one value per channel follows it."""

from collections.abc import Iterable

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, fixed
from fxslim.graph.propagation import Propagation, as_int, results_without_channels, rule
from fxslim.graph.unweighted_norms import size_attribute


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
    _follow_channels(propagation, node, node.args[1:5], x)
    return _with_statistics(node, x)


@rule("instance_norm")
def instance_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Statistics are each channel's own; whatever vectors there are follow it."""
    x = propagation.labels(node.args[0])
    vectors = [value for value in node.all_input_nodes if value is not node.args[0]]
    if x is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "instance norm over another dim than its channels")
    if propagation.has_computed(vectors):
        return propagation.freeze_inputs(node, "instance norm with computed values")
    _follow_channels(propagation, node, vectors, x)
    return x


def _follow_channels(propagation: Propagation, node: fx.Node, vectors: Iterable[object], x: Labels) -> None:
    """Vectors have an entry for each channel in dim 1; a module that has none knows their number."""
    _follow_size(propagation, node, "num_features", 0, x.vector(1))
    for value in vectors:
        name = propagation.state_name(value)
        if name is not None and propagation.states[name].dim() == 1:
            propagation.slot(name, 0, x.vector(1))


def _follow_size(propagation: Propagation, node: fx.Node, attribute: str, dim: int, line: Ids) -> bool:
    """The size attribute of a norm without parameters follows its channels; False where there is none."""
    layer = node.meta["module"]
    if size_attribute(propagation.modules.get(layer)) != attribute:
        return False
    propagation.slot(f"{layer}.{attribute}".lstrip("."), dim, line)
    return True


@rule("native_group_norm")
def group_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Statistics are made over equally many channels in each group."""
    x = propagation.labels(node.args[0])
    if x is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "group norm over another dim than its channels")
    if propagation.has_computed(node.args[1:3]):
        return propagation.freeze_inputs(node, "group norm with computed values")
    vectors = [value for value in node.args[1:3] if value is not None]
    if not vectors and not _follow_size(propagation, node, "num_channels", 0, x.vector(1)):
        return propagation.freeze_inputs(node, "group norm without a weight and outside torch.nn.GroupNorm")
    _follow_channels(propagation, node, vectors, x)
    groups = as_int(node.args[6])
    propagation.group(node, x.vector(1), groups, f"{groups} groups normalised by {node.meta['module']}")
    return _with_statistics(node, x)


@rule("native_layer_norm", "rms_norm")
def layer_norm(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Statistics over the last dims; weight and bias follow the one that has channels."""
    x = propagation.labels(node.args[0])
    if x is None:
        return results_without_channels(node)
    x = propagation.tied_along(x, len(x.shape) - 1)
    shape = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
    outside = len(x.shape) - len(shape)  # type: ignore[arg-type]
    inside = [d - outside for d in x.varying if d >= outside]
    vectors = [value for value in node.all_input_nodes if value is not node.args[0]]
    if inside and len(x.varying) != 1:
        return propagation.freeze_inputs(node, "layer norm over several labelled dims")
    if inside and propagation.has_computed(vectors):
        return propagation.freeze_inputs(node, "layer norm with computed values")
    line = x.vector(x.varying[0]) if inside else None
    if line is not None:
        known = _follow_size(propagation, node, "normalized_shape", inside[0], line)
        if not vectors and not known:
            return propagation.freeze_inputs(node, "a norm without a weight and outside torch.nn's modules")
    for value in vectors:
        name = propagation.state_name(value)
        if name is not None and line is not None:
            propagation.slot(name, inside[0], line)
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
