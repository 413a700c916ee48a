# SPDX-License-Identifier: Apache-2.0
"""PruningPlan: which entries of which parameters stay; structure only, saved as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.errors import CheckpointError, PlanError, TraceError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import ModelState
from fxslim.graph.recording import undisturbed
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.tagged_sizes import Attribute
from fxslim.plan.applied_plans import names_in, remember_plan
from fxslim.plan.file_writing import write_file
from fxslim.plan.index_ranges import pack_ranges, unpack_ranges
from fxslim.pruning.verification import Verification, verify_cuts

KIND = "pruning"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One line of a plan's table."""

    name: str
    before: int
    after: int
    layers: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningPlan:
    """What to remove from a model with exactly these parameter shapes.

    ``cuts`` are kept indices in the coordinates of the model that the plan is applied to. Printing a plan gives
    a table of groups with their channels before and after, and the cost before and after.
    """

    cuts: tuple[Cut, ...]
    shapes: dict[str, tuple[int, ...]]
    rows: tuple[GroupRow, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    # Sizes that the user's own modules keep as attributes and read in their forward.
    new_sizes: tuple[NewAttribute, ...] = ()
    # What the user should know: paths that the example inputs did not take.
    notes: tuple[str, ...] = ()
    # Kept from planning: a forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()

    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
        """Remove the channels, in place; returns the model. After any error the model is as it was.

        Gradients and what ``optimizer`` keeps for the parameters are cut alike, so training goes on. Losses that
        were computed before can't be walked backward any more.
        """
        changes = Changes()
        try:
            self.change_model(model, changes, optimizer)
            return model
        except BaseException:
            changes.undo()
            raise

    def change_model(self, model: nn.Module, changes: Changes, optimizer: Optimizer | None = None) -> None:
        """Cut the model, try its forward and note the plan; the caller takes ``changes`` back after an error."""
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        names = names_in(model, self.shapes)
        with torch.inference_mode(False):
            changes.on_undo(ModelState(model).restore)
            surgery = Surgery(model, self._named_for(names), optimizer, self.new_sizes)
            surgery.commit(changes)
            self._try_forwards(model, changes)
            remember_plan(model, self, changes)
            surgery.close_old_graphs(changes)

    def _try_forwards(self, model: nn.Module, changes: Changes) -> None:
        """Run the model on the plan's example inputs; one that fails uncut too is not the plan's fault."""
        has_values = not any(parameter.is_meta for parameter in model.parameters())
        for inputs in self.inputs:
            failure = _failure(model, inputs) if has_values and inputs.have_values else None
            if failure is None:
                continue
            changes.undo()
            uncut = _failure(model, inputs)
            if uncut is not None:
                raise TraceError(
                    f"the model's own forward fails on the plan's example inputs {inputs} (nothing was changed): "
                    f"{type(uncut).__name__}: {uncut}"
                ) from uncut
            raise PlanError(
                f"the pruned model's forward failed ({type(failure).__name__}: {failure}); it reads a size that is "
                "written as a number. Nothing was changed. Name the layers around it in skip="
            ) from failure

    def _named_for(self, names: dict[str, str]) -> list[Cut]:
        """The cuts with the model's own names, which may have a wrapper's prefix."""
        return [dataclasses.replace(cut, name=names[cut.name]) for cut in self.cuts]

    def verify(self, model: nn.Module, inputs: Any) -> Verification:
        """Prove that the pruned model computes what the model computes with the removed channels silenced."""
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        names = names_in(model, self.shapes)
        with torch.inference_mode(False):
            return verify_cuts(model, self._named_for(names), inputs, self.new_sizes)

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
            "cuts": [[c.name, c.dim, c.blocks, pack_ranges(c.keep)] for c in self.cuts],
            "new_sizes": [
                [n.attribute.module, n.attribute.name, n.attribute.item, n.before, n.after] for n in self.new_sizes
            ],
            "rows": [[r.name, r.before, r.after, r.layers] for r in self.rows],
            "macs": list(self.macs),
            "params": list(self.params),
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
            cuts = tuple(_cut(shapes, *fields) for fields in data["cuts"])
            if len({(cut.name, cut.dim) for cut in cuts}) != len(cuts):
                raise PlanError("a dim is cut twice")
            return cls(
                cuts=cuts,
                new_sizes=tuple(_new_size(*fields) for fields in data.get("new_sizes", ())),
                shapes=shapes,
                rows=tuple(
                    GroupRow(name=str(n), before=int(b), after=int(a), layers=int(k)) for n, b, a, k in data["rows"]
                ),
                macs=(int(data["macs"][0]), int(data["macs"][1])),
                params=(int(data["params"][0]), int(data["params"][1])),
                notes=tuple(map(str, data.get("notes", ()))),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}; save it again") from error

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'group':{width}}  {'before':>7} {'after':>7} {'layers':>7}"]
        lines += [f"{r.name:{width}}  {r.before:>7} {r.after:>7} {r.layers:>7}" for r in self.rows]
        for name, (before, after) in (("macs", self.macs), ("params", self.params)):
            lines.append(f"{name}: {before:,} -> {after:,} ({after / max(before, 1):.1%} kept)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{r.name}</td><td>{r.before}</td><td>{r.after}</td></tr>" for r in self.rows)
        return f"<table><tr><th>group</th><th>before</th><th>after</th></tr>{rows}</table>"


def _failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What a forward raises, if anything."""
    try:
        with undisturbed(model, training=False), torch.no_grad():
            inputs.copied().run(model)
    except Exception as error:
        return error
    return None


def _cut(shapes: dict[str, tuple[int, ...]], name: str, dim: int, blocks: int, keep: str) -> Cut:
    """A cut that fits the shape of its parameter."""
    shape = shapes[name]
    if not (0 <= dim < len(shape) and 1 <= blocks <= max(1, shape[0]) and shape[0] % blocks == 0):
        raise PlanError(f"{name} of shape {shape} has no dim {dim} in {blocks} blocks")
    return Cut(name=name, dim=dim, blocks=blocks, keep=unpack_ranges(keep, shape[dim] * blocks))


def _new_size(module: str, name: str, item: int | None, before: int, after: int) -> NewAttribute:
    attribute = Attribute(module=str(module), name=str(name), item=None if item is None else int(item))
    return NewAttribute(attribute=attribute, before=int(before), after=int(after))
