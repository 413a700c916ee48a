# SPDX-License-Identifier: Apache-2.0
"""Weights of layers that a module's own code reads: for models that are planned without an example to run."""

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

# What is asked of a weight without using its values.
_QUESTIONS = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta"})


def users_in_code(model: nn.Module) -> dict[str, str]:
    """{weight: module whose forward says ``self.layer.weight``}, or the layer where that forward calls it too.

    Code that reads weights in other words is not seen.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 4)
    ...
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.layer.weight)
    >>> users_in_code(nn.Sequential(Net()))
    {'0.layer.weight': '0'}
    """
    found = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        read, called = _paths(kind)
        for path in read:
            layer = ".".join(part for part in (name, path) if part)
            try:
                owner = module.get_submodule(path)
            except AttributeError:
                continue
            if "weight" in owner._parameters:
                found[f"{layer}.weight"] = layer if path in called else name
    return found


@functools.cache
def _paths(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Paths below ``self`` whose weight a forward uses, and those that it calls."""
    if kind.__module__.startswith("torch.nn."):
        return frozenset(), frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(), frozenset()
    nodes = list(ast.walk(tree))
    asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _QUESTIONS}
    read = {
        path
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked
        if (path := _path(node.value))
    }
    called = {path for node in nodes if isinstance(node, ast.Call) and (path := _path(node.func))}
    return frozenset(read), frozenset(called)


def _path(node: ast.expr) -> str:
    """``a.b`` for ``self.a.b``, "" for all else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""
