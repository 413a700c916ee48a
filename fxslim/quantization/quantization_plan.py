# SPDX-License-Identifier: Apache-2.0
"""A plan of which layers are quantized and where other quantizers go."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.nn.quantizers.integer_sums import Channels
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.plan import Plan, Shapes
from fxslim.quantization.quantized_models import (
    add_to_optimizer,
    fold_norms,
    introduce_neighbours,
    quantize_layers,
    quantize_outputs,
)
from fxslim.quantization.sums_read import Sums
from fxslim.quantization.targets import as_target
from fxslim.quantization.trial import try_quantized


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
class QuantizationPlan(Plan):
    """Layers with their configs, modules whose output is quantized, and the target that decided the grids.

    ``apply`` turns the layers into their QAT counterparts: they stay the same objects with the same Parameters. What is
    learned besides, such as clips, joins the ``optimizer`` as a group of its own, without weight decay.
    """

    kind = "quantization"

    layers: tuple[LayerPlan, ...]
    outputs: Mapping[str, ActivationQuant]
    shapes: Shapes
    target: str
    start_step: int = 0
    # Batch norms that are folded into the convolution before, {convolution: norm}, and when they freeze.
    folds: Mapping[str, str] = field(default_factory=dict)
    freeze_after: int | None = None
    # Batch norms that deployment folds into the layer before, {layer: norm}, and the modules from whose output other
    # layers get their input on a grid, {layer: module}: both decide the steps of the sums that biases are added to.
    norms: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    # Whose sums the input quantizer of a layer, or the output quantizer of a module, reads, and where the channels are.
    sums: Mapping[str, Sums] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    # A forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()

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
            sums = {
                module_in(model, reader): tuple((module_in(model, layer), where) for layer, where in given)
                for reader, given in self.sums.items()
            }
            introduce_neighbours(model, norms, sources, sums)
            if values:
                try_quantized(model, self.inputs)
        added = [parameter for parameter in model.parameters() if id(parameter) not in before]
        add_to_optimizer(optimizer, added, changes)
        remember_plan(model, self, changes)

    def _to_fields(self) -> dict[str, Any]:
        return {
            "layers": {one.name: one.config.to_dict() for one in self.layers},
            "given": [one.name for one in self.layers if one.is_given],
            "users": {one.name: one.user for one in self.layers if one.user is not None},
            "outputs": {name: asdict(config) for name, config in self.outputs.items()},
            "target": self.target,
            "start_step": self.start_step,
            "folds": dict(self.folds),
            "norms": dict(self.norms),
            "sources": dict(self.sources),
            "sums": {reader: [[layer, *where] for layer, where in given] for reader, given in self.sums.items()},
            "freeze_after": self.freeze_after,
            "notes": list(self.notes),
        }

    @classmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
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
            shapes=shapes,
            target=as_target(data["target"]).name,
            start_step=int(data["start_step"]),
            folds={str(conv): str(norm) for conv, norm in data.get("folds", {}).items()},
            norms={str(layer): str(norm) for layer, norm in data.get("norms", {}).items()},
            sources={str(layer): str(giver) for layer, giver in data.get("sources", {}).items()},
            sums={
                str(reader): tuple((str(layer), Channels.from_list(where)) for layer, *where in given)
                for reader, given in data.get("sums", {}).items()
            },
            freeze_after=None if data.get("freeze_after") is None else int(data["freeze_after"]),
            notes=tuple(map(str, data["notes"])),
        )

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
