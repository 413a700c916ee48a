# SPDX-License-Identifier: Apache-2.0
"""Batches cut into samples, since a criterion of single samples must not let them cancel out; batches read again."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxslim.batches import Data
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


class KeptBatches:
    """Batches of an iterator that can be read only once, kept while they are read so that they can be read again."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source, self.seen = iter(source), list[Any]()

    def __iter__(self) -> Iterator[Any]:
        yield from list(self.seen)
        for batch in self.source:
            self.seen.append(batch)
            yield batch


def repeatable(data: Data) -> Data:
    """Data that can be read any number of times: planning may rank again where it learns more about the model.

    >>> data = repeatable(Data(batches=iter([1, 2])))
    >>> list(data), list(data)
    ([1, 2], [1, 2])
    """
    once = isinstance(data.batches, Iterator)
    return replace(data, batches=KeptBatches(data.batches)) if once else data
