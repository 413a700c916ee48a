# SPDX-License-Identifier: Apache-2.0
"""Operators that mix pixels: pools, upsampling, reductions, padding."""

import numpy as np
from torch import fx

from fxslim.graph.labels import FIXED, Labels, compressed, fixed
from fxslim.graph.propagation import Propagation, as_int, combined, results_without_channels, rule
from fxslim.graph.written_norms import AVERAGES, channel_vectors

POOLS = """
max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
avg_pool3d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
fractional_max_pool2d
""".split()


@rule(*POOLS)
def pool(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Channels stay what they are."""
    x = propagation.labels(node.args[0])
    if x is None:
        return results_without_channels(node)
    results = results_without_channels(node)
    shapes = [r.shape for r in results] if isinstance(results, list) else [results.shape]
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), len(x.shape))
    if spatial < len(x.shape):
        # A table of positions is resized: each channel is one at all of them.
        x = propagation.tied_along(x, len(x.shape) - spatial - 1)
    if any(d >= len(x.shape) - spatial for d in x.varying):
        return propagation.freeze_inputs(node, "pixels of a labelled dim are mixed")
    several = [Labels(shape=shape, ids=x.ids) for shape in shapes]
    return several if isinstance(results, list) else several[0]


@rule("max_unpool2d", "max_unpool3d")
def unpool(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Places are counted inside each channel, so values and places go together."""
    x, places = propagation.labels(node.args[0]), propagation.labels(node.args[1])
    spatial = 3 if "3d" in str(node.target) else 2
    if x is None or places is None or any(d >= len(x.shape) - spatial for d in (*x.varying, *places.varying)):
        return propagation.freeze_inputs(node, "pixels of a labelled dim are mixed")
    met = combined(propagation, node, [x, places], x.shape)
    return Labels(shape=node.meta["shape"], ids=met.ids)


@rule("local_response_norm")
def normalise_neighbours(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Which channels are neighbours would depend on the choice."""
    return propagation.freeze_inputs(node, "each channel is divided by a sum over its neighbours: all stay")


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "var_mean",
    "std_mean",
    "prod",
    "max",
    "min",
    "argmax",
    "argmin",
    "any",
    "all",
)
def reduce_dims(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Reducing pixels keeps channels; reducing channels freezes them, but in a norm."""
    x = propagation.labels(node.args[0])
    results = results_without_channels(node)
    if x is None:
        return propagation.freeze_inputs(node, "a reduction of several values")
    reduced = _reduced_dims(node, len(x.shape))
    over = [d for d in x.varying if d in reduced]
    if over and _averages_in_norm(propagation, node, x, reduced):
        return results
    if not all(propagation.tie_rows(node, x, d) for d in over):
        return propagation.freeze_inputs(node, f"{node.meta['call'].name or 'a reduction'} over channels")
    if over:
        # Runs again with the rows tied.
        return results
    several = results if isinstance(results, list) else [results]
    kept = [size for d, size in enumerate(x.ids.shape) if d not in reduced]
    found = [
        Labels(shape=r.shape, ids=x.ids if len(r.shape) == len(x.shape) else x.ids.reshape(kept)) if r.shape else r
        for r in several
    ]
    return found if isinstance(results, list) else found[0]


def _reduced_dims(node: fx.Node, rank: int) -> set[int]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dims = given.get("dim")
    if dims is None or dims == [] or rank == 0:
        return set(range(rank))
    return {as_int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _averages_in_norm(propagation: Propagation, node: fx.Node, x: Labels, reduced: set[int]) -> bool:
    """Whether a module averages over the only labelled dim and has vectors for it: they follow, the result does not.

    Vectors as long as another dim that is averaged over could be for either.
    """
    layer, channel = node.meta["module"], x.varying[0]
    if node.meta["call"].name not in AVERAGES or len(x.varying) != 1:
        return False
    size = x.shape[channel]
    if any(x.shape[d] == size for d in reduced - {channel}):
        return False
    vectors = [(name, dim) for name, dim, length in channel_vectors(propagation.modules.get(layer)) if length == size]
    states = [(f"{layer}.{name}".lstrip("."), dim) for name, dim in vectors]
    # A tied parameter is known by another name.
    if not states or any(name not in propagation.states for name, _ in states):
        return False
    for name, dim in states:
        propagation.slot(name, dim, x.vector(channel))
    return True


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "_safe_softmax")
def normalise_along(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Along a dim without channels the labels pass."""
    x = propagation.labels(node.args[0])
    if x is None:
        return fixed(node.meta["shape"])
    dim = as_int(node.args[1]) % len(x.shape)
    if dim in x.varying and not propagation.tie_rows(node, x, dim):
        return propagation.freeze_inputs(node, "softmax over channels")
    return x


@rule("constant_pad_nd", "pad")
def pad(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """New pixels belong to their channel; new channels are fixed."""
    x = propagation.labels(node.args[0])
    if x is None:
        return fixed(node.meta["shape"])
    amounts = [int(a) for a in node.args[1]]  # type: ignore[union-attr, arg-type]
    ids = x.ids
    for i in range(0, len(amounts), 2):
        dim = len(x.shape) - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        if (before or after) and dim in x.varying:
            if before < 0 or after < 0:
                return propagation.freeze_inputs(node, "channels cut off by a negative padding")
            widths = [(before, after) if d == dim else (0, 0) for d in range(ids.ndim)]
            ids = np.pad(ids, widths, constant_values=FIXED)
    return compressed(Labels(shape=node.meta["shape"], ids=ids))
