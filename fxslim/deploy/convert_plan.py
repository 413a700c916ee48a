# SPDX-License-Identifier: Apache-2.0
"""A plan of how quantized and sparse layers are deployed; replayed, it rebuilds the structure for saved weights."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.deploy.layer_conversion import BLOCKS, LayerConversion, conversion_from_row
from fxslim.deploy.readiness import refuse_unready, refuse_violations
from fxslim.deploy.stripped_masks import take_no_nested, unmask
from fxslim.errors import ConfigError, PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.recording import undisturbed
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.surgery.changes import Changes
from fxslim.nn import HandedOverLinearQAT, MaskedWeights, QuantizedLayer
from fxslim.nn.deployed_layers import become, held
from fxslim.nn.norm_folding import without_norm
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.plan.applied_plans import module_in, names_in, remember_plan
from fxslim.plan.plan import Plan, Shapes


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvertPlan(Plan):
    """The layers that are deployed; all other quantizers of activations keep their grid for good.

    ``apply`` turns the layers into deployed ones, which do not train: it takes no optimizer.
    """

    kind = "convert"

    layers: tuple[LayerConversion, ...]
    shapes: Shapes
    # ReLUs that became part of layers.
    relus: tuple[str, ...] = ()
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
        if optimizer is not None:
            raise ConfigError("a converted model does not train: give no optimizer")
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        names_in(model, self.shapes)
        if values:
            self._refuse_unready(model)
        changes.on_undo(HookState(model).restore)
        changes.on_undo(ModelState(model).restore)
        with torch.inference_mode(False), torch.no_grad():
            done = self._change(model, changes, values)
            if values:
                _try(model, self.inputs)
        remember_plan(model, done, changes)

    def _refuse_unready(self, model: nn.Module) -> None:
        refuse_unready(model)
        for one in self.layers:
            layer = model.get_submodule(module_in(model, one.name))
            if one.form == BLOCKS and isinstance(layer, MaskedWeights):
                refuse_violations(one.name, layer)

    def _change(self, model: nn.Module, changes: Changes, values: bool) -> Self:
        """Convert; returns the plan with the blocks that the weights have."""
        made: list[tuple[nn.Module, nn.Module]] = []
        dense, done = list[nn.Module](), list[LayerConversion]()
        for one in self.layers:
            layer, deployed = one.made(model, values=values)
            if deployed is None:
                dense.append(layer)
            else:
                made.append((layer, deployed))
            done.append(one if deployed is None else one.with_blocks_of(deployed))
            norm = None if one.norm is None else model.get_submodule(module_in(model, one.norm))
            if norm is not None:
                made.append((norm, without_norm(norm)))
        made += [(relu, without_norm(relu)) for relu in self._relus_of(model)]
        fixed = _fixed(model)
        for module, deployed in made:
            changes.make(
                functools.partial(become, module, deployed), functools.partial(_restore, module, *_kept(module))
            )
        for owner, name, quantizer in fixed:
            if owner._modules.get(name) is not None and isinstance(owner._modules[name], ActivationQuantizer):
                changes.set_item(owner._modules, name, quantizer)
        unmask(model, dense, changes)
        take_no_nested(model, changes)
        return replace(self, layers=tuple(done))

    def _relus_of(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(module_in(model, name)) for name in self.relus]

    def _to_fields(self) -> dict[str, Any]:
        return {
            "layers": [one.to_row() for one in self.layers],
            "relus": list(self.relus),
            "notes": list(self.notes),
        }

    @classmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
        return cls(
            layers=tuple(conversion_from_row(*fields) for fields in data["layers"]),
            shapes=shapes,
            relus=tuple(map(str, data.get("relus", ()))),
            notes=tuple(map(str, data["notes"])),
        )

    def __str__(self) -> str:
        rows = [("layer", "kernel", "bytes before", "bytes after")]
        for one in self.layers:
            kernel = one.kernel + (f", {one.norm} folded in" if one.norm is not None else "")
            kernel += ", ReLU" if one.blocks is not None and one.blocks.relu else ""
            rows.append((one.name or "(the model)", kernel, f"{one.bytes_before:,}", f"{one.bytes_after:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}  {d.rjust(widths[3])}"
            for a, b, c, d in rows
        ]
        before, after = (sum(getattr(one, f"bytes_{name}") for one in self.layers) for name in ("before", "after"))
        lines.append(f"{len(self.layers)} layers: {before:,} -> {after:,} bytes ({after / max(before, 1):.1%} kept)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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
