# SPDX-License-Identifier: Apache-2.0
"""Tagged ints in the place of the ints that modules keep: as attributes, and in objects such as a configuration.

Several modules may hold one object, and each reads numbers of its own from it: while a model is recorded each holds a
copy. When a number changes, the module gets a copy with that number for good, and the object stays as it is.
"""

import copy
from collections.abc import Collection
from enum import Enum
from types import FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, Self

from torch import Tensor, nn

from fxslim.graph.tagged_sizes import Attribute, tagged

_INTERNALS = frozenset(vars(nn.Module()))
_NO_CONFIGURATION = (nn.Module, Tensor, type, Enum, FunctionType, MethodType, ModuleType)


def held_value(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or ``a.b`` for that of an object which is one."""
    held: Any = module
    for part in name.split("."):
        held = getattr(held, part, None)
    return held


class TaggedAttributes:
    """Puts them in on entering and takes them away on leaving.

    ``untouched``: objects by ``id`` that modules keep sharing. ``written`` afterwards: those that the forward changed.
    """

    def __init__(self, model: nn.Module, untouched: Collection[int] = ()) -> None:
        self.model, self.untouched = model, untouched
        self.written: set[int] = set()
        self._replaced: list[tuple[dict[str, Any], str, Any, Any]] = []
        # What modules hold, their copy, and what that had at first.
        self._copies: list[tuple[Any, Any, dict[str, Any]]] = []

    def __enter__(self) -> Self:
        for module_name, module in self.model.named_modules():
            attributes = vars(module)
            for name, value in list(attributes.items()):
                if name not in _INTERNALS:
                    self._put(attributes, name, value, module_name)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for attributes, name, stand_in, value in self._replaced:
            if attributes.get(name) is stand_in:
                attributes[name] = value
        for value, stand_in, before in self._copies:
            now = vars(stand_in)
            if now.keys() != before.keys() or any(now[name] is not before[name] for name in before):
                self.written.add(id(value))
        self._replaced.clear()
        self._copies.clear()

    def _put(self, attributes: dict[str, Any], name: str, value: Any, module: str) -> None:
        stand_in = _stand_in(value, module, name)
        if stand_in is value:
            stand_in = self._copied(value, module, name)
        if stand_in is not value:
            attributes[name] = stand_in
            self._replaced.append((attributes, name, stand_in, value))

    def _copied(self, value: Any, module: str, name: str) -> Any:
        """A copy of an object with ints in it; the object itself where that can't be."""
        if isinstance(value, _NO_CONFIGURATION) or callable(value) or id(value) in self.untouched:
            return value
        if type(value).__module__.partition(".")[0] in ("torch", "builtins"):
            return value
        inside = getattr(value, "__dict__", {})
        tags = {key: _stand_in(item, module, f"{name}.{key}") for key, item in inside.items()}
        if all(tags[key] is item for key, item in inside.items()):
            return value
        try:
            stand_in = copy.copy(value)
            vars(stand_in).update(tags)
        except Exception:
            return value
        self._copies.append((value, stand_in, dict(vars(stand_in))))
        return stand_in


def _stand_in(value: Any, module: str, name: str) -> Any:
    if type(value) is int:
        return tagged(value, Attribute(module=module, name=name))
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(tagged(item, Attribute(module=module, name=name, item=i)) for i, item in enumerate(value))
    return value
