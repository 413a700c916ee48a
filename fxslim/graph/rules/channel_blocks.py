# SPDX-License-Identifier: Apache-2.0
"""Operators that trade channels for pixels, or halves of channels for one: a block of entries is one channel."""

import math

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, along, compressed
from fxslim.graph.propagation import Propagation, as_int, rule


def _tied(propagation: Propagation, rows: Ids) -> Ids:
    """The entries of each row go together; one label for each row."""
    propagation.space.unify(np.broadcast_to(rows[:, :1], rows.shape), rows)
    return rows[:, 0]


def _traded(
    propagation: Propagation, node: fx.Node, dims: tuple[int, int], size: int, *, joins: bool
) -> Labels | list[Labels]:
    """Blocks of ``size`` channels become one (``joins``), or one becomes that many; channel dims from the end."""
    x, shape = propagation.labels(node.args[0]), node.meta["shape"]
    assert x is not None
    if any(d != len(x.shape) - dims[0] for d in x.varying):
        return propagation.freeze_inputs(node, "blocks of pixels are made of a labelled dim")
    line = x.vector(len(x.shape) - dims[0])
    line = _tied(propagation, line.reshape(-1, size)) if joins else np.repeat(line, size)
    return along(shape, len(shape) - dims[1], line)


@rule("pixel_shuffle")
def shuffle_pixels(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """The r * r channels behind one go together."""
    return _traded(propagation, node, (3, 3), as_int(node.args[1]) ** 2, joins=True)


@rule("pixel_unshuffle")
def unshuffle_pixels(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Each channel becomes r * r."""
    return _traded(propagation, node, (3, 3), as_int(node.args[1]) ** 2, joins=False)


@rule("col2im")
def fold(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """The entries of a kernel behind one channel go together."""
    return _traded(propagation, node, (2, 3), math.prod(node.args[2]), joins=True)  # type: ignore[arg-type]


@rule("im2col")
def unfold(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Each channel becomes one for each entry of the kernel."""
    return _traded(propagation, node, (3, 2), math.prod(node.args[1]), joins=False)  # type: ignore[arg-type]


@rule("channel_shuffle", "native_channel_shuffle")
def shuffle_channels(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Entry j of all groups goes together, so that the order of the others does not depend on the choice."""
    x, groups = propagation.labels(node.args[0]), as_int(node.args[1])
    assert x is not None
    if any(d != 1 for d in x.varying):
        return propagation.freeze_inputs(node, "channels are shuffled along a labelled dim")
    tied = _tied(propagation, x.vector(1).reshape(groups, -1).T)
    return along(node.meta["shape"], 1, np.repeat(tied, groups))


@rule("glu")
def gate(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """Entry i of one half and of the other go together."""
    x = propagation.labels(node.args[0])
    assert x is not None
    dim = as_int(node.args[1] if len(node.args) > 1 else -1) % len(x.shape)
    if dim not in x.varying:
        return Labels(shape=node.meta["shape"], ids=x.ids)
    first, second = np.split(x.ids, 2, axis=dim)
    propagation.space.unify(first, second)
    return compressed(Labels(shape=node.meta["shape"], ids=first))
