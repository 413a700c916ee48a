# SPDX-License-Identifier: Apache-2.0
"""SparsityPlan: which weights get a mask of which pattern, and how it is chosen; structure only, saved as JSON."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.errors import PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.trial_forward import try_forward
from fxslim.nn import MaskSettings
from fxslim.patterns import PatternCheck
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.plan import Plan, Shapes
from fxslim.sparsity.mask_choice import choose_masks, mute_optimizer
from fxslim.sparsity.masked_models import check_model, put_masks_on
from fxslim.sparsity.methods import Method, method_from_dict
from fxslim.sparsity.order_fields import pack_orders, unpack_orders


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """One weight of the plan: its name, and the pattern with what happens in training.

    ``user``: where others read the weight, the module whose forwards count as the layer's.
    """

    name: str
    settings: MaskSettings
    user: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityPlan(Plan):
    """Which weights of a model with exactly these shapes are masked.

    ``apply`` turns the layers into their masked counterparts. They stay the same objects with the same Parameters, so
    optimizers go on; what ``optimizer`` keeps for masked weights is set to 0. Where ``orders`` moves channels,
    gradients and optimizer state move along, and losses from before can't be walked backward. The masks are values:
    they are chosen from the weights that are found, or a state dict brings them (``values=False`` masks nothing).
    Printing a plan gives a table of weights with their patterns.
    """

    kind = "sparsity"
    reads_data = True

    weights: tuple[WeightPlan, ...]
    shapes: Shapes
    method: Method
    # Layer by layer, each from what is read once the layers before it are sparse; so many times, ever sparser.
    progressive: int = 0
    # An order of channels in which masks keep more; without masks the model computes what it did.
    orders: tuple[Cut, ...] = ()
    notes: tuple[str, ...] = ()
    # Kept from planning: a forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()
    # Kept from planning, for methods that look at data, and for that forward where there are no inputs. Not saved.
    data: Data | None = None

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
        model = without_compile_wrapper(model)
        names = names_in(model, self.shapes)
        changes.on_undo(HookState(model).restore)
        changes.on_undo(ModelState(model).restore)
        settings = {names[one.name]: one.settings for one in self.weights}
        users = {names[one.name]: module_in(model, one.user) for one in self.weights if one.user is not None}
        with torch.inference_mode(False), torch.no_grad():
            orders = [replace(cut, name=names[cut.name]) for cut in self.orders]
            surgery = Surgery(model, orders, optimizer if orders else None)
            surgery.commit(changes)
            put_masks_on(model, settings, users, changes)
            if values:
                choose_masks(model, settings, self.method, self._data(data), self.progressive, changes)
                mute_optimizer(model, settings, optimizer, changes)
            batches = self.data if data is None else data
            try_forward(model, list(settings), self.inputs, batches if values else None)
        remember_plan(model, replace(self, data=None), changes)
        surgery.close_old_graphs(changes)

    def _data(self, given: Data | None) -> Data | None:
        if not self.method.needs:
            return None
        data = self.data if given is None else given
        if data is None:
            raise PlanError(
                f"method {self.method.name!r} looks at data, which plans don't keep in files: give data= when planning "
                "or apply(model, data=batches), or apply(model, values=False) and load a state"
            )
        return data

    def check(self, model: nn.Module) -> dict[str, PatternCheck]:
        """For each masked weight: violations of its pattern, and its share of zeros.

        >>> import fxslim
        >>> net = nn.Sequential(nn.Linear(8, 4))
        >>> plan = fxslim.plan_sparsity(net, "2:4")
        >>> plan.check(plan.apply(net))["0.weight"].sparsity
        0.5
        """
        return check_model(without_compile_wrapper(model), {one.name: one.settings for one in self.weights})

    def _to_fields(self) -> dict[str, Any]:
        return {
            "weights": {one.name: one.settings.to_dict() for one in self.weights},
            "users": {one.name: one.user for one in self.weights if one.user is not None},
            "method": self.method.to_dict(),
            "progressive": self.progressive,
            "orders": pack_orders(self.orders),
            "notes": list(self.notes),
        }

    @classmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
        users = {str(name): str(user) for name, user in data.get("users", {}).items()}
        weights = tuple(
            WeightPlan(name=name, settings=MaskSettings.from_dict(settings), user=users.get(name))
            for name, settings in data["weights"].items()
        )
        unknown = [one.name for one in weights if one.name not in shapes]
        if unknown:
            raise PlanError(f"it masks {unknown[0]}, whose shape it does not know")
        strange = users.keys() - data["weights"].keys()
        if strange:
            raise PlanError(f"it knows who uses {min(strange)}, which it does not mask")
        return cls(
            weights=weights,
            shapes=shapes,
            method=method_from_dict(data["method"]),
            progressive=int(data["progressive"]),
            orders=unpack_orders(data.get("orders", ()), shapes),
            notes=tuple(map(str, data["notes"])),
        )

    def __str__(self) -> str:
        width = max([len(one.name) for one in self.weights] + [6])
        lines = [f"{'weight':{width}}  {'shape':>18}  pattern"]
        removed = size = 0.0
        for one in self.weights:
            shape = self.shapes[one.name]
            pattern = one.settings.pattern
            lines.append(f"{one.name:{width}}  {'x'.join(map(str, shape)):>18}  {pattern}")
            numel = torch.Size(shape).numel()
            size, removed = size + numel, removed + numel * (pattern.removed() or 0.0)
        lines.append(f"{len(self.weights)} weights by {self.method.name}: {removed:,.0f} of {size:,.0f} entries go")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{one.name}</td><td>{self.shapes[one.name]}</td><td>{one.settings.pattern}</td></tr>"
            for one in self.weights
        )
        return f"<table><tr><th>weight</th><th>shape</th><th>pattern</th></tr>{rows}</table>"
