# SPDX-License-Identifier: Apache-2.0
"""Entries chosen by their values: the best of a dim, sorted ones, those that are not 0, boxes that do not overlap."""

from torch import fx

from fxslim.graph.labels import Labels, fixed
from fxslim.graph.propagation import Propagation, as_int, operator_name, results_without_channels, rule


@rule("topk", "sort", "argsort", "kthvalue", "median", "mode", "cummax", "cummin")
def choose(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Along a dim without channels each channel chooses for itself: values and places have its label."""
    x = propagation.labels(node.args[0])
    name, results = operator_name(node), results_without_channels(node)
    if x is None or not x.shape or (name == "median" and isinstance(results, Labels)):
        return propagation.freeze_inputs(node, f"chosen by {name}")
    place = 2 if name in ("topk", "kthvalue") else 1
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", -1)
    dim = as_int(given) % len(x.shape)
    if dim in x.varying:
        return propagation.freeze_inputs(node, f"chosen by {name}")
    several = [_along_the_rest(x, result, dim) for result in (results if isinstance(results, list) else [results])]
    return several if isinstance(results, list) else several[0]


def _along_the_rest(x: Labels, result: Labels, dim: int) -> Labels:
    """The dim may be gone from the result; a result that nobody reads has no shape."""
    if len(result.shape) == len(x.shape):
        return Labels(shape=result.shape, ids=x.ids)
    return Labels(shape=result.shape, ids=x.ids.squeeze(dim)) if len(result.shape) == len(x.shape) - 1 else result


@rule("nms", "nonzero", "unique", "_unique2", "searchsorted", "bucketize", "multinomial", "bincount")
def find(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """How many are found depends on all values, and places are numbers: what is looked at stays."""
    return propagation.freeze_inputs(node, f"chosen by {operator_name(node)}")


@rule("roi_align", "roi_pool")
def pool_regions(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Pixels of regions are pooled channel by channel; the regions themselves are coordinates."""
    x = propagation.labels(node.args[0])
    results = results_without_channels(node)
    if x is None or any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "regions are cut out along a labelled dim")
    propagation.freeze(propagation.labels(node.args[1]), node, "used as regions")
    several = [
        Labels(shape=result.shape, ids=x.ids) if len(result.shape) == len(x.shape) else fixed(result.shape)
        for result in (results if isinstance(results, list) else [results])
    ]
    return several if isinstance(results, list) else several[0]
