# SPDX-License-Identifier: Apache-2.0
"""What a forward may change in a model besides its outputs: modes, buffers, plain attributes."""

from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from fxslim.graph.torch_switches import TorchSwitches

_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (list, dict, set)
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))
_CODE = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)


class ModelState:
    """Modes, buffers and attributes of all modules, as they are now; ``restore`` may be called any number of times.

    Lists, dicts and sets among the attributes get their items back, and other objects, such as a configuration, their
    own attributes; what is inside of those is not looked at.
    Torch's own switches, which a recording turns, are remembered too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = TorchSwitches()
        self.modules = [(m, _attributes(m), dict(m._buffers)) for m in model.modules()]
        held = {id(value): value for _, attributes, _ in self.modules for value in attributes.values()}
        self.contents = [(inside, inside.copy()) for value in held.values() if (inside := _inside(value)) is not None]
        self.buffers: list[tuple[Tensor, Tensor]] = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        """Put everything back."""
        self.switches.restore()
        for module, attributes, buffers in self.modules:
            for added in _attributes(module).keys() - attributes.keys():
                del module.__dict__[added]
            module.__dict__.update(attributes)
            for added in module._buffers.keys() - buffers.keys():
                del module._buffers[added]
            module._buffers.update(buffers)
        for container, items in self.contents:
            _refill(container, items)
        changed = tuple(buffer for buffer, _ in self.buffers)
        # Values are as they were, so graphs that saved these buffers stay right.
        with torch.no_grad(), _unsafe_preserve_version_counter(changed):
            for buffer, before in self.buffers:
                buffer.copy_(before)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _INTERNALS}


def _inside(value: Any) -> Any:
    """What can be changed in an attribute: the items of a container, the attributes of an object."""
    if type(value) in _CONTAINERS:
        return value
    return None if isinstance(value, _CODE) else getattr(value, "__dict__", None)


class HookState:
    """The hooks of all modules: a forward may add some, and note in an attribute that it has."""

    def __init__(self, model: nn.Module) -> None:
        held = [getattr(module, name) for module in model.modules() for name in _HOOKS]
        self.contents = [(hooks, hooks.copy()) for hooks in held]

    def restore(self) -> None:
        """Take away what was added."""
        for hooks, before in self.contents:
            if hooks.keys() != before.keys():
                _refill(hooks, before)


def _refill(container: Any, items: Any) -> None:
    if isinstance(container, list):
        container[:] = items
        return
    container.clear()
    container.update(items)
