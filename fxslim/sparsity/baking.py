# SPDX-License-Identifier: Apache-2.0
"""Writes the zeros of masks into the weights and takes the masks away."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.errors import PlanError
from fxslim.graph.model_state import HookState
from fxslim.graph.recording import named_states
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes
from fxslim.nn import MaskedWeights, QuantizedLayer
from fxslim.nn.handed_over import stop_counting
from fxslim.nn.masked_weights import drop_masks, strip_masks
from fxslim.plan.applied_plans import names_in, remember_plan
from fxslim.plan.plan import Plan, Shapes


def bake(model: nn.Module) -> nn.Module:
    """Write the zeros into the weights and turn masked layers back into plain ones, in place; returns the model.

    For export and for code that knows only torch's layers.

    >>> import fxslim
    >>> net = bake(fxslim.sparsify(nn.Sequential(nn.Linear(8, 4)), "2:4"))
    >>> type(net[0]).__name__, fxslim.patterns.check(net[0], "2:4").ok
    ('Linear', True)
    """
    inner = without_compile_wrapper(model)
    BakePlan(shapes={name: tuple(state.shape) for name, state in named_states(inner)}).apply(inner)
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class BakePlan(Plan):
    """That masks were taken away at this point, for replaying a model's plans."""

    kind = "bake"

    shapes: Shapes

    def change_model(
        self,
        model: nn.Module,
        changes: Changes,
        optimizer: Optimizer | None = None,
        *,
        values: bool = True,
        data: Data | None = None,
    ) -> None:
        refuse_wrapped(model)
        names_in(model, self.shapes)
        layers = [module for module in model.modules() if isinstance(module, MaskedWeights) and module.weight_names]
        if not layers:
            raise PlanError("no layer of this model has a mask")
        changes.on_undo(HookState(model).restore)
        for layer in layers:
            bake_layer(layer, changes)
        for module in model.modules():
            stop_counting(module)
        remember_plan(model, self, changes)

    def _to_fields(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
        return cls(shapes=shapes)

    def __str__(self) -> str:
        return "masks written into the weights"


def bake_layer(module: MaskedWeights, changes: Changes) -> None:
    """Write the zeros into one layer's weights and take its masks away."""
    names, plain = module.weight_names, module.float_class
    before = dict(vars(module)), dict(module._buffers), dict(module._forward_pre_hooks)
    for name in names:
        weight = module.stored(name)
        changes.replace_data(weight, module.masked(name).detach().clone(), weight.grad)

    def restore() -> None:
        vars(module).update(before[0])
        module._buffers.clear()
        module._buffers.update(before[1])
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(before[2])

    if isinstance(module, QuantizedLayer):
        # It stays what it is, and goes on to keep torch's fused layers away.
        changes.make(lambda: drop_masks(module, names), restore)
        return
    changes.make(lambda: strip_masks(module, names), restore)
    with torch.no_grad():
        vars(module).pop("float_class", None)
        changes.set_attribute(module, "__class__", plain)
