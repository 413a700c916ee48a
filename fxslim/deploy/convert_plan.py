# SPDX-License-Identifier: Apache-2.0
"""A plan of how quantized layers are deployed; replayed, it rebuilds the structure for saved weights."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.deploy.readiness import refuse_unready
from fxslim.errors import CheckpointError, ConfigError, PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.recording import undisturbed
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.nn import HandedOverLinearQAT, QuantizedLayer
from fxslim.nn.deployed_layers import become, held
from fxslim.nn.norm_folding import without_norm
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.file_writing import write_file

KIND = "convert"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerConversion:
    """What becomes of one layer; ``kernel`` is what it computes with on the machine that planned.

    ``norm``: a batch norm that becomes part of it. ``given``: the quantizer that its input comes from.
    """

    name: str
    norm: str | None
    given: str | None
    kernel: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvertPlan:
    """The layers that are deployed; all other quantizers of activations keep their grid for good."""

    layers: tuple[LayerConversion, ...]
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    # A forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()

    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None, values: bool = True) -> nn.Module:
        """Turn the layers into deployed ones, in place; returns the model. After any error it is as it was."""
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
        """Convert and note the plan; the caller takes ``changes`` back after an error."""
        if optimizer is not None:
            raise ConfigError("a converted model does not train: give no optimizer")
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        names_in(model, self.shapes)
        if values:
            refuse_unready(model)
        changes.on_undo(HookState(model).restore)
        changes.on_undo(ModelState(model).restore)
        with torch.inference_mode(False), torch.no_grad():
            self._change(model, changes)
            if values:
                _try(model, self.inputs)
        remember_plan(model, self, changes)

    def _change(self, model: nn.Module, changes: Changes) -> None:
        made: list[tuple[nn.Module, nn.Module]] = []
        for one in self.layers:
            layer = model.get_submodule(module_in(model, one.name))
            if not isinstance(layer, QuantizedLayer):
                raise PlanError(f"{one.name or 'the model'} is a {type(layer).__name__}, which is not quantized")
            norm = None if one.norm is None else model.get_submodule(module_in(model, one.norm))
            given: Any = None if one.given is None else model.get_submodule(module_in(model, one.given))
            made.append((layer, layer.deployed(norm, given)))
            if norm is not None:
                made.append((norm, without_norm(norm)))
        fixed = _fixed(model)
        for module, deployed in made:
            changes.make(
                functools.partial(become, module, deployed), functools.partial(_restore, module, *_kept(module))
            )
        for owner, name, quantizer in fixed:
            if owner._modules.get(name) is not None and isinstance(owner._modules[name], ActivationQuantizer):
                changes.set_item(owner._modules, name, quantizer)

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
            "layers": [
                [one.name, one.norm, one.given, one.kernel, one.bytes_before, one.bytes_after] for one in self.layers
            ],
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
            return cls(
                layers=tuple(_layer(*fields) for fields in data["layers"]),
                shapes={name: tuple(map(int, shape)) for name, shape in data["shapes"].items()},
                notes=tuple(map(str, data["notes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}; save it again") from error

    def __str__(self) -> str:
        rows = [("layer", "kernel", "bytes before", "bytes after")]
        for one in self.layers:
            kernel = one.kernel + (f", {one.norm} folded in" if one.norm is not None else "")
            rows.append((one.name or "(the model)", kernel, f"{one.bytes_before:,}", f"{one.bytes_after:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}  {d.rjust(widths[3])}"
            for a, b, c, d in rows
        ]
        before, after = (sum(getattr(one, f"bytes_{name}") for one in self.layers) for name in ("before", "after"))
        lines.append(f"{len(self.layers)} layers: {before:,} -> {after:,} bytes ({after / max(before, 1):.1%} kept)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _layer(name: str, norm: str | None, given: str | None, kernel: str, before: int, after: int) -> LayerConversion:
    return LayerConversion(
        name=str(name), norm=None if norm is None else str(norm), given=None if given is None else str(given),
        kernel=str(kernel), bytes_before=int(before), bytes_after=int(after),
    )  # fmt: skip


def _fixed(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Quantizers that do not belong to layers, with their owners, and what they become."""
    return [
        (owner, name, held(module))
        for owner in model.modules()
        if not isinstance(owner, QuantizedLayer | HandedOverLinearQAT)
        for name, module in owner._modules.items()
        if isinstance(module, ActivationQuantizer)
    ]


def _kept(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    return type(module), dict(vars(module))


def _restore(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    module.__class__ = kind
    module.__dict__.clear()
    module.__dict__.update(attributes)


def _try(model: nn.Module, examples: tuple[Inputs, ...]) -> None:
    """The converted model must run."""
    for inputs in examples:
        if not inputs.have_values:
            continue
        try:
            with undisturbed(model, training=False):
                inputs.copied().run(model)
        except Exception as error:
            raise PlanError(
                f"the converted model's forward failed on {inputs} ({type(error).__name__}: {error}). Nothing was "
                "changed"
            ) from error
