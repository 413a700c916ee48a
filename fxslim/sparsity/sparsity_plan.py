# SPDX-License-Identifier: Apache-2.0
"""SparsityPlan: which weights get a mask of which pattern, and how it is chosen; structure only, saved as JSON."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, given_data
from fxslim.errors import CheckpointError, PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.trial_forward import try_forward
from fxslim.nn import MaskSettings
from fxslim.patterns import PatternCheck
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.file_writing import write_file
from fxslim.sparsity.mask_choice import choose_masks, mute_optimizer
from fxslim.sparsity.masked_models import check_model, put_masks_on
from fxslim.sparsity.methods import Method, method_from_dict
from fxslim.sparsity.order_fields import pack_orders, unpack_orders

KIND = "sparsity"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """One weight of the plan: its name, and the pattern with what happens in training.

    ``user``: where others read the weight, the module whose forwards count as the layer's.
    """

    name: str
    settings: MaskSettings
    user: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityPlan:
    """Which weights of a model with exactly these shapes are masked.

    The masks are values: ``apply`` chooses them from the weights that it finds, or a state dict brings them.
    Printing a plan gives a table of weights with their patterns.
    """

    weights: tuple[WeightPlan, ...]
    shapes: dict[str, tuple[int, ...]]
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

    def apply(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        values: bool = True,
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> nn.Module:
        """Turn the layers into their masked counterparts, in place, and choose the masks; returns the model.

        Layers stay the same objects with the same Parameters, so optimizers go on; what ``optimizer`` keeps for
        masked weights is set to 0. Where ``orders`` moves channels, gradients and optimizer state move along, and
        losses from before can't be walked backward. After any error the model is as it was. ``values=False`` masks
        nothing and leaves the masks to a state dict. Methods that look at data read ``data`` by ``forward``; by
        default what the plan was made with.
        """
        given = given_data(data, forward)
        return all_or_nothing(
            model, lambda changes: self.change_model(model, changes, optimizer, values=values, data=given)
        )

    def change_model(
        self,
        model: nn.Module,
        changes: Changes,
        optimizer: Optimizer | None = None,
        *,
        values: bool = True,
        data: Data | None = None,
    ) -> None:
        """Mask the layers and note the plan; the caller takes ``changes`` back after an error."""
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

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, under a temporary name first."""
        text = json.dumps(self.to_dict(), indent=1)
        write_file(path, lambda temporary: temporary.write_text(text))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "kind": KIND,
            "version": VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "weights": {one.name: one.settings.to_dict() for one in self.weights},
            "users": {one.name: one.user for one in self.weights if one.user is not None},
            "method": self.method.to_dict(),
            "progressive": self.progressive,
            "orders": pack_orders(self.orders),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The plan that ``to_dict`` wrote."""
        if data.get("kind") != KIND or data.get("version") != VERSION:
            raise CheckpointError(
                f"expected a {KIND} plan of version {VERSION}, got kind {data.get('kind')!r}, "
                f"version {data.get('version')!r}"
            )
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}; save it again") from error

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
