# SPDX-License-Identifier: Apache-2.0
"""A plan of which layers are quantized and where other quantizers go."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.errors import CheckpointError, PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.file_writing import write_file
from fxslim.quantization.quantized_models import (
    add_to_optimizer,
    fold_norms,
    introduce_neighbours,
    quantize_layers,
    quantize_outputs,
)
from fxslim.quantization.targets import as_target
from fxslim.quantization.trial import try_quantized

KIND = "quantization"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of one layer; ``user``: the module that reads its weight, where that is not the layer.

    ``is_given``: its input comes quantized, and is not quantized again.
    """

    name: str
    config: QuantConfig
    user: str | None = None
    is_given: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizationPlan:
    """Layers with their configs, modules whose output is quantized, and the target that decided the grids."""

    layers: tuple[LayerPlan, ...]
    outputs: Mapping[str, ActivationQuant]
    shapes: Mapping[str, tuple[int, ...]]
    target: str
    start_step: int = 0
    # Batch norms that are folded into the convolution before, {convolution: norm}, and when they freeze.
    folds: Mapping[str, str] = field(default_factory=dict)
    freeze_after: int | None = None
    # Batch norms that deployment folds into the layer before, {layer: norm}, and the modules from whose output other
    # layers get their input on a grid, {layer: module}: both decide the steps of the sums that biases are added to.
    norms: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    # A forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()

    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None, values: bool = True) -> nn.Module:
        """Turn the layers into their QAT counterparts, in place; returns the model.

        Layers stay the same objects with the same Parameters. What is learned besides, such as clips, joins the
        ``optimizer`` as a group of its own, without weight decay. After any error the model is as it was.
        """
        return all_or_nothing(model, lambda changes: self.change_model(model, changes, optimizer, values=values))

    def change_model(
        self,
        model: nn.Module,
        changes: Changes,
        optimizer: Optimizer | None = None,
        *,
        values: bool = True,
        data: Data | None = None,
    ) -> None:
        """Quantize and note the plan; the caller takes ``changes`` back after an error."""
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        names_in(model, self.shapes)
        changes.on_undo(HookState(model).restore)
        changes.on_undo(ModelState(model).restore)
        before = {id(parameter) for parameter in model.parameters()}
        with torch.inference_mode(False), torch.no_grad():
            layers = [replace(one, name=module_in(model, one.name), user=_in(model, one.user)) for one in self.layers]
            quantize_layers(model, layers, changes)
            quantize_outputs(model, {module_in(model, k): v for k, v in self.outputs.items()}, self.start_step, changes)
            folds, norms, sources = (
                {module_in(model, k): module_in(model, v) for k, v in pairs.items()}
                for pairs in (self.folds, self.norms, self.sources)
            )
            fold_norms(model, folds, self.freeze_after, changes)
            introduce_neighbours(model, norms, sources)
            if values:
                try_quantized(model, self.inputs)
        added = [parameter for parameter in model.parameters() if id(parameter) not in before]
        add_to_optimizer(optimizer, added, changes)
        remember_plan(model, self, changes)

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
            "layers": {one.name: one.config.to_dict() for one in self.layers},
            "given": [one.name for one in self.layers if one.is_given],
            "users": {one.name: one.user for one in self.layers if one.user is not None},
            "outputs": {name: asdict(config) for name, config in self.outputs.items()},
            "target": self.target,
            "start_step": self.start_step,
            "folds": dict(self.folds),
            "norms": dict(self.norms),
            "sources": dict(self.sources),
            "freeze_after": self.freeze_after,
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
            users = {str(name): str(user) for name, user in data.get("users", {}).items()}
            given = {str(name) for name in data["given"]}
            strange = (users.keys() | given) - data["layers"].keys()
            if strange:
                raise PlanError(f"it knows more of {min(strange)}, which it does not quantize")
            return cls(
                layers=tuple(
                    LayerPlan(
                        name=str(name),
                        config=QuantConfig.from_dict(config),
                        user=users.get(name),
                        is_given=name in given,
                    )
                    for name, config in data["layers"].items()
                ),
                outputs={str(name): ActivationQuant(**config) for name, config in data["outputs"].items()},
                shapes={name: tuple(map(int, shape)) for name, shape in data["shapes"].items()},
                target=as_target(data["target"]).name,
                start_step=int(data["start_step"]),
                folds={str(conv): str(norm) for conv, norm in data.get("folds", {}).items()},
                norms={str(layer): str(norm) for layer, norm in data.get("norms", {}).items()},
                sources={str(layer): str(giver) for layer, giver in data.get("sources", {}).items()},
                freeze_after=None if data.get("freeze_after") is None else int(data["freeze_after"]),
                notes=tuple(map(str, data["notes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}; save it again") from error

    def __str__(self) -> str:
        rows = [("layer", "weight", "input", "output")]
        for one in self.layers:
            config = one.config
            shown = "as it comes" if one.is_given else _shown(config.activation) or "float"
            rows.append((one.name or "(the model)", _weight(config), shown, _shown(config.output)))
        rows += [(name, "", "", _shown(config)) for name, config in self.outputs.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        count = sum(one.config.weight is not None for one in self.layers)
        if self.folds:
            later = "" if self.freeze_after is None else f", frozen after {self.freeze_after} batches"
            lines.append(f"{len(self.folds)} batch norms are folded into the weights before quantization{later}")
        lines.append(f"{count} weights and {self.num_activations} activations are quantized for {self.target}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    @property
    def num_activations(self) -> int:
        """How many quantizers of activations there are."""
        own = [part for one in self.layers for part in (one.config.activation, one.config.output)]
        return sum(part is not None for part in own) + len(self.outputs)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{one.name}</td><td>{_weight(one.config)}</td><td>{_shown(one.config.activation)}</td>"
            f"<td>{_shown(one.config.output)}</td></tr>"
            for one in self.layers
        )
        rows += "".join(f"<tr><td>{n}</td><td></td><td></td><td>{_shown(c)}</td></tr>" for n, c in self.outputs.items())
        return f"<table><tr><th>layer</th><th>weight</th><th>input</th><th>output</th></tr>{rows}</table>"


def _in(model: nn.Module, name: str | None) -> str | None:
    return None if name is None else module_in(model, name)


def _weight(config: QuantConfig) -> str:
    weight = config.weight
    if weight is None:
        return "float"
    kind = f"int{weight.bits}" if weight.format == "int" else weight.format
    return f"{kind} per {weight.granularity}"


def _shown(config: ActivationQuant | None) -> str:
    if config is None:
        return ""
    if config.format != "int":
        return config.format
    return f"{'' if config.signed or config.symmetric else 'u'}int{config.bits}{' from 0' if config.fixed_min else ''}"
