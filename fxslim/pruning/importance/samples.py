# SPDX-License-Identifier: Apache-2.0
"""Batches cut into samples, since a criterion of single samples must not let them cancel out."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxslim.errors import ConfigError


def single_samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one: all its tensors are cut along their first dim.

    >>> from torch import tensor
    >>> list(single_samples((tensor([[1], [2]]), tensor([5, 6]))))
    [(tensor([[1]]), tensor([5])), (tensor([[2]]), tensor([6]))]
    """
    if isinstance(batch, Mapping):
        batch = dict(batch)
    sizes = sorted({len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()})
    if len(sizes) != 1:
        found = f"its tensors have {sizes} entries in their first dims" if sizes else "it has no tensors"
        raise ConfigError(
            f"a batch of data can't be cut into samples: {found}; "
            "per='batch' takes each batch as one sample: Taylor(per='batch') with batches of one"
        )
    for i in range(sizes[0]):
        yield tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)  # noqa: B023
