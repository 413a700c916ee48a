# SPDX-License-Identifier: Apache-2.0
"""Norms that a user wrote by hand: a module with a weight for each channel that averages over the channels."""

from collections.abc import Iterator

from torch import nn

# Functions by which such a module may average over its channels; the proof computes them over the kept ones.
AVERAGES = frozenset(["mean", "var", "std", "var_mean", "std_mean", "norm", "vector_norm", "linalg_vector_norm"])


def channel_vectors(module: nn.Module | None) -> Iterator[tuple[str, int, int]]:
    """Name, dim and length of each vector in a module that has vectors only and no modules inside.

    >>> list(channel_vectors(nn.LayerNorm(4))), list(channel_vectors(nn.Linear(2, 4)))
    ([('weight', 0, 4), ('bias', 0, 4)], [])
    """
    if module is None or next(module.children(), None) is not None:
        return
    states = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if any(max(state.shape, default=1) != state.numel() for _, state in states):
        return
    for name, state in states:
        if state.numel() > 1:
            yield name, state.shape.index(state.numel()), state.numel()
