# SPDX-License-Identifier: Apache-2.0
"""Losses that were computed before a cut: walking them backward afterwards is an error that says so.

Left alone, such a backward would fail somewhere inside of an operator, or give a parameter a gradient of its old
shape.
"""

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fxslim.errors import PlanError
from fxslim.graph.surgery.changes import Changes


class OldGraphs:
    """The places where graphs made so far would leave their gradients; to be taken before anything is cut."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.nodes: dict[str, Node] = {
            name: torch.autograd.graph.get_gradient_edge(p).node for name, p in parameters.items() if p.requires_grad
        }

    def close(self, changes: Changes) -> None:
        """Refuse gradients, and mark the values that old graphs remember as changed."""
        for name, node in self.nodes.items():
            handles: list[Any] = []
            changes.make(
                functools.partial(_refuse_gradients, node, name, handles), functools.partial(_accept_gradients, handles)
            )
        for parameter in self.parameters.values():
            torch.autograd.graph.increment_version(parameter)


def _refuse_gradients(node: Node, name: str, handles: list[Any]) -> None:
    handles.append(node.register_prehook(functools.partial(_raise, name)))


def _accept_gradients(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _raise(name: str, *_: object) -> NoReturn:
    raise PlanError(
        f"{name} was cut after this loss was computed, so the gradient does not fit it any more: "
        "drop the old loss, call optimizer.zero_grad() and run the model's forward again"
    )
