# SPDX-License-Identifier: Apache-2.0
"""Sees in whose forward a stored weight, or what was made of it, meets an activation, by whatever operator.

A norm of the weight, or a penalty, is made of weights alone and says nothing about outputs. A cast, a slice or
several weights put together stand for the weights until they meet an activation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# With these a buffer is an activation too: a layer may read a table.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "linear")


class WeightReads:
    """Calls ``hear`` with the name of the weight and the running module."""

    def __init__(
        self, states: Iterable[Tensor], weights: Mapping[str, Tensor], hear: Callable[[str, str], None]
    ) -> None:
        self.hear = hear
        self.states = {memory_of(state) for state in states if _has_memory(state)}
        self.weights = {memory_of(weight): frozenset({name}) for name, weight in weights.items()}
        # What was made of weights; alive, so that its memory is not given out again.
        self.made: dict[int, tuple[frozenset[str], Tensor]] = {}

    def see(self, operator: str, values: list[Any], results: list[Any], module: str) -> None:
        """An operator with these arguments; neither a view nor one that puts a mask on."""
        if operator.startswith("new_") or operator.endswith("_like"):
            return
        tensors = [value for value in values if _has_memory(value)]
        names = frozenset[str]().union(*(self._names(value) for value in tensors))
        if not names:
            return
        others = [value for value in tensors if value.dim() and not self._names(value)]
        if any(operator in _PRODUCTS or memory_of(value) not in self.states for value in others):
            for name in sorted(names):
                self.hear(name, module)
            return
        for result in results:
            if _has_memory(result) and result.dim() > 1 and memory_of(result) not in self.weights:
                self.made[memory_of(result)] = names, result

    def _names(self, value: Tensor) -> frozenset[str]:
        memory = memory_of(value)
        made = self.made.get(memory)
        return self.weights.get(memory, frozenset()) if made is None else made[0]


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor and its views share."""
    return tensor.untyped_storage()._cdata


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
