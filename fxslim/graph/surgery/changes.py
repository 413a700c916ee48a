# SPDX-License-Identifier: Apache-2.0
"""Changes that can be taken back: the one way in which surgery writes to a model or an optimizer."""

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


class Changes:
    """A list of what was done, for taking all of it back in reverse order.

    Each change is noted before it is made, and restoring works from any state in between, so an error or an
    interrupt at any point leaves nothing behind:

    >>> changes, settings = Changes(), {"width": 64}
    >>> changes.set_item(settings, "width", 32)
    >>> changes.undo()
    >>> settings
    {'width': 64}
    """

    def __init__(self) -> None:
        self._restores: list[Callable[[], object]] = []

    def make(self, change: Callable[[], object], restore: Callable[[], object]) -> None:
        """Make one change. ``restore`` must bring everything back even where the change stopped half-way."""
        self.on_undo(restore)
        change()

    def on_undo(self, restore: Callable[[], object]) -> None:
        """Call this too when all is taken back."""
        self._restores.append(restore)

    def undo(self) -> None:
        """Everything as it was before the first change."""
        while self._restores:
            self._restores[-1]()
            self._restores.pop()

    def set_item(self, owner: MutableMapping[str, Any], key: str, value: Any) -> None:
        """``owner[key] = value``, where the key exists."""
        self.make(
            functools.partial(owner.__setitem__, key, value), functools.partial(owner.__setitem__, key, owner[key])
        )

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``; an attribute that was not there is deleted again."""
        old = getattr(owner, name, _ABSENT)
        restore = (
            functools.partial(_delete, owner, name) if old is _ABSENT else functools.partial(setattr, owner, name, old)
        )
        self.make(functools.partial(setattr, owner, name, value), restore)

    def replace_data(self, state: Tensor, data: Tensor, grad: Tensor | None) -> None:
        """Another tensor, of any shape, in a parameter or buffer that stays the same object."""
        self.make(
            functools.partial(replace_data, state, data, grad),
            functools.partial(replace_data, state, state.data, state.grad),
        )


def all_or_nothing(model: nn.Module, change: Callable[[Changes], None]) -> nn.Module:
    """The model after ``change(changes)``; after an error or an interrupt all that was changed is taken back.

    >>> layer = nn.Linear(2, 2)
    >>> def fails(changes):
    ...     changes.set_attribute(layer, "in_features", 1)
    ...     raise ValueError
    >>> all_or_nothing(layer, fails)
    Traceback (most recent call last):
    ValueError
    >>> layer.in_features
    2
    """
    changes = Changes()
    try:
        change(changes)
        return model
    except BaseException:
        changes.undo()
        raise


def _delete(owner: Any, name: str) -> None:
    if hasattr(owner, name):
        delattr(owner, name)


def replace_data(state: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Another tensor in a parameter; the detour over another dtype drops what autograd cached about the shape."""
    state.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    state.data = torch.empty(0, dtype=other, device=data.device)
    state.data = data
    state.grad = grad
