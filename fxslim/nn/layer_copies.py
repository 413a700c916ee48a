# SPDX-License-Identifier: Apache-2.0
"""A layer as another class: what counterparts are made from plain layers with, and plain ones from counterparts."""

import copy
import weakref
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

_CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def copied_as(layer: nn.Module, cls: type[Any]) -> Any:
    """Another module of this class with the same parameters, buffers, submodules, attributes and hooks.

    >>> plain = nn.Linear(2, 2)
    >>> copied_as(plain, nn.Linear).weight is plain.weight
    True
    """
    result = object.__new__(cls)
    for key, value in vars(layer).items():
        hooks = "_hooks" in key and isinstance(value, dict)
        own = copy.copy(value) if hooks or key in _CONTENTS else value
        if hooks:
            own.update({number: _rebound(hook, layer, result) for number, hook in own.items()})
        result.__dict__[key] = own
    return result


def _rebound(hook: Any, old: nn.Module, new: nn.Module) -> Any:
    """Hooks that know their module, by a weak reference, get to know the new one."""
    if not isinstance(hook, _WrappedHook) or not hook.with_module or hook.module() is not old:
        return hook
    bound = copy.copy(hook)
    bound.module = weakref.ref(new)
    return bound
