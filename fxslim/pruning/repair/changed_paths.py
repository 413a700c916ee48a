# SPDX-License-Identifier: Apache-2.0
"""What a forward computes from changed parameters: everything behind a change, and nothing beside it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class ChangedPaths(TorchDispatchMode):
    """While it is on, remembers which tensors come from the changed ones.

    >>> import torch
    >>> weight, other, x = torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 2)
    >>> with ChangedPaths([weight]) as paths:
    ...     y, z = (x @ weight).relu(), x @ other
    >>> paths.reach(y), paths.reach(z)
    (True, False)
    """

    def __init__(self, changed: Iterable[Tensor]) -> None:
        super().__init__()
        self._reached = WeakIdKeyDictionary()
        for tensor in changed:
            self._reached[tensor] = True

    def reach(self, value: Any) -> bool:
        """Whether a tensor in this comes from a changed one."""
        return any(isinstance(leaf, Tensor) and leaf in self._reached for leaf in tree_leaves(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.reach((args, kwargs)):
            written = args[:1] if func._schema.is_mutable else ()
            for tensor in tree_leaves((result, written, kwargs.get("out"))):
                if isinstance(tensor, Tensor):
                    self._reached[tensor] = True
                    if tensor._base is not None:
                        self._reached[tensor._base] = True
        return result
