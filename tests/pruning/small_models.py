# SPDX-License-Identifier: Apache-2.0
"""A small model, and snapshots of everything that must be as before after an error."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import fxslim
from tests.graph.random_networks import randomise
from tests.torch_switches import switches

X = torch.randn(2, 3, 16, 16)
_INTERNALS = vars(nn.Module()).keys() - {"training"}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )
    )  # fmt: skip


def _frozen(value: Any) -> Any:
    """A tensor as its bytes and layout, with the object that it is."""
    if not isinstance(value, torch.Tensor):
        return copy.copy(value)
    plain = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return id(value), value.dtype, value.shape, value.stride(), value.requires_grad, plain


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Values, identities, gradients, attributes, hooks, plans, an optimizer's state, and switches of torch."""
    states = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {
        "values": {name: _frozen(state) for name, state in states.items()},
        "grads": {name: _frozen(state.grad) for name, state in states.items()},
        "identity": {name: id(state) for name, state in states.items()},
        "attributes": {
            f"{name}.{key}": _frozen(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key not in _INTERNALS
        },
        "hooks": {
            f"{name}.{key}": list(value.values())
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.endswith("_hooks")
        },
        "plans": [id(plan) for plan in fxslim.applied(model)],
        "switches": switches(),
        "random": _frozen(torch.get_rng_state())[-1],
    }
    if optimizer is not None:
        found["state"] = {id(p): tree_map(_frozen, dict(kept)) for p, kept in optimizer.state.items()}
        found["groups"] = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return found


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        assert after[key] == value, key
