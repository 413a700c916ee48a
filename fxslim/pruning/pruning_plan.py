# SPDX-License-Identifier: Apache-2.0
"""PruningPlan: which entries of which parameters stay; structure only, saved as JSON."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.errors import CheckpointError, FxslimError, PlanError, TraceError
from fxslim.graph.channel_graph import refuse_wrapped
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.tagged_sizes import Attribute
from fxslim.graph.unweighted_norms import find_unweighted_norms
from fxslim.plan.applied_plans import check_fits, plain_name, remember_plan
from fxslim.plan.index_ranges import pack_ranges, unpack_ranges
from fxslim.pruning.channel_masking import ChannelMask, mask_of
from fxslim.pruning.constant_folding import Fold, folded_values
from fxslim.pruning.example_shapes import describe_inputs, described_inputs
from fxslim.pruning.verification import Verification, verify_cuts
from fxslim.pruning.weight_masks import WeightMasks

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
    # Made from masks: entries that they make 0, and constants to fold. None: whatever is removed counts as 0.
    zeros: tuple[Cut, ...] | None = None
    folds: tuple[Fold, ...] = ()
    # What the user should know: paths that the example inputs did not take.
    notes: tuple[str, ...] = ()
    # Kept from planning: a forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()

    @classmethod
    def from_masks(cls, model: nn.Module, inputs: Any, masks: WeightMasks) -> "PruningPlan":
        """Remove the channels that masks of weights leave without effect: the outputs stay those of the masked model.

        ``masks`` is {layer or parameter: tensor of 0 (removed) and 1}, of the weight's shape or one value per
        output channel, or {layer: {"weight": mask, "bias": mask}}. A channel that is still a constant (its bias is
        not masked) is folded into the next layer's bias, or the running mean of a batch norm after it, where that
        is exact in eval mode; else it stays, and ``notes`` say why. Weights that are masked inside channels that
        stay must be 0 in the model already: the plan is structure.

        >>> from torch import ones, randn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> mask = ones(8)
        >>> mask[:3] = 0
        >>> print(PruningPlan.from_masks(net, randn(1, 3, 8, 8), {"0": mask}))
        group   before   after  layers
        0            8       5       2
        macs: 12,384 -> 7,740 (62.5% kept)
        params: 516 -> 324 (62.8% kept)
        """
        from fxslim.pruning.masks_to_plan import plan_from_masks

        return plan_from_masks(model, inputs, masks)

    @classmethod
    def from_desc(cls, model: nn.Module, inputs: Any, desc: Any) -> "PruningPlan":
        """The plan that msModelSlim's ``desc`` describes: {layer: {"output": [kept, "--x-"], "input": [...]}}.

        "-" is a kept channel, "x" a dropped one. Layers that are not listed lose the channels that they share
        with listed ones; a listed layer loses exactly what it lists, or this is an error.

        >>> from torch import randn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> PruningPlan.from_desc(net, randn(1, 3, 8, 8), {"0": {"output": [3, "--x-"]}}).to_desc()
        {'0': {'output': [3, '--x-']}, '2': {'input': [3, '--x-']}}
        """
        from fxslim.pruning.description import plan_from_desc

        return plan_from_desc(model, inputs, desc)

    def to_desc(self) -> dict[str, dict[str, list[Any]]]:
        """The plan as msModelSlim's ``desc``, for JSON: only changed layers, norms by their "input"."""
        from fxslim.pruning.description import describe_cuts

        return describe_cuts(self.cuts, self.shapes)

    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None, values: bool = True) -> nn.Module:
        """Remove the channels, in place; returns the model. After any error the model is as it was.

        ``values=False`` changes shapes only and leaves the values to a state dict: constants are not folded.
        A mask of this plan is taken away with its channels.
        """
        self.cut_model(model, optimizer, values=values)
        remember_plan(model, self)
        return model

    def mask(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
        """Hold what the plan removes at 0 while the model trains; ``apply`` removes it later. Returns the model.

        The masked model computes what the pruned one would, in training too. Its class, its parameters and
        their names stay; the masked entries are 0 in every ``state_dict()`` and their gradients are 0. With
        ``optimizer`` what it keeps for them is set to 0 as well, so that they stay 0 between a step and the next
        forward too. The mask itself is no part of the state: mask a model again after its state was loaded.
        Only the model's own forward is masked, not one of its submodules called alone.
        """
        states = self._checked_states(model)
        mask = self._own_mask(model)
        if mask is None:
            for name, value in self._folded(model).items():
                states[name].data.copy_(value)
            mask = ChannelMask(model, tuple(self._named_for(model)))
            mask.attach(model)
        if optimizer is not None:
            mask.mute_optimizer(model, optimizer)
        return model

    def unmask(self, model: nn.Module) -> nn.Module:
        """Take the mask away; entries that were masked start from 0. Returns the model."""
        self._checked_states(model)
        mask = self._own_mask(model)
        if mask is None:
            raise PlanError("the model is not masked: call plan.mask(model) first")
        mask.detach(model)
        return model

    def _checked_states(self, model: nn.Module) -> dict[str, torch.Tensor]:
        refuse_wrapped(model)
        check_fits(model, self.shapes)
        return dict(named_states(model))

    def _own_mask(self, model: nn.Module) -> ChannelMask | None:
        """The mask of this plan on a model; another plan's is refused."""
        mask = mask_of(model)
        if mask is not None and mask.cuts != tuple(self._named_for(model)):
            raise PlanError(
                "the model is masked by another plan: apply that one, or take it away with its unmask(model)"
            )
        return mask

    def _folded(self, model: nn.Module) -> dict[str, torch.Tensor]:
        if self.zeros is None:
            return {}
        if not self.inputs:
            raise PlanError(
                "the plan was made from masks and has no example inputs, which are needed to find the constants that "
                "masked channels give: make it again with from_masks, or apply it with values=False and load a state"
            )
        names = {plain_name(name): name for name, _ in named_states(model)}
        folds = [Fold(weight=names[fold.weight], into=names[fold.into]) for fold in self.folds]
        return folded_values(model, self._named_for(model), _renamed(self.zeros, model), folds, self.inputs)

    def cut_model(self, model: nn.Module, optimizer: Optimizer | None = None, *, values: bool = True) -> Surgery:
        """Cut the model and try its forward; returns what can undo it."""
        self._checked_states(model)
        mask = self._own_mask(model)
        surgery = Surgery(
            model,
            self._named_for(model),
            optimizer,
            new_sizes=self.new_sizes,
            values=self._folded(model) if values else None,
        )
        if mask is not None:
            mask.detach(model)
            surgery.undo_steps.append(functools.partial(mask.attach, model))
        try:
            surgery.commit()
            for inputs in self.inputs:
                self._try_forward(model, inputs)
        except BaseException as error:
            surgery.undo()
            if isinstance(error, PlanError) and self.inputs:
                self._check_whole_model_runs(model)
            raise
        return surgery

    def _check_whole_model_runs(self, model: nn.Module) -> None:
        """A model that fails uncut too (another device or dtype than the inputs) is not the plan's fault."""
        try:
            with undisturbed(model, training=False), torch.no_grad():
                self.inputs[0].copied().run(model)
        except Exception as error:
            raise TraceError(
                f"the model's own forward fails on the plan's example inputs {self.inputs[0]} (nothing was changed): "
                f"{type(error).__name__}: {error}"
            ) from error

    def _named_for(self, model: nn.Module) -> list[Cut]:
        """The cuts with the model's own names, which may have a wrapper's prefix."""
        known = [name for name, _ in named_states(model)] + [name for name, _, _ in find_unweighted_norms(model)]
        names = {plain_name(name): name for name in known}
        return [dataclasses.replace(cut, name=names[cut.name]) for cut in self.cuts]

    @staticmethod
    def _try_forward(model: nn.Module, inputs: Inputs) -> None:
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type == "meta":
            return
        try:
            with undisturbed(model, training=False), torch.no_grad():
                inputs.copied().run(model)
        except FxslimError:
            raise
        except Exception as error:
            raise PlanError(
                f"the pruned model's forward failed ({type(error).__name__}: {error}); it reads a size that is "
                "written as a number. Nothing was changed. Name the layers around it in skip="
            ) from error

    def verify(self, model: nn.Module, inputs: Any) -> Verification:
        """Prove that the pruned model computes what the model computes with the removed channels silenced.

        A plan made from masks: what the model computes with the masked entries at 0.
        """
        check_fits(model, self.shapes)
        if self.zeros is None:
            return verify_cuts(model, self._named_for(model), inputs, new_sizes=self.new_sizes)
        return verify_cuts(
            model,
            self._named_for(model),
            inputs,
            new_sizes=self.new_sizes,
            zeros=_renamed(self.zeros, model),
            values=self._folded(model),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, under a temporary name first."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(self.to_dict(), indent=1))
        temporary.replace(path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        data: dict[str, Any] = {
            "kind": KIND,
            "version": VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "cuts": _packed(self.cuts),
            "new_sizes": [
                [n.attribute.module, n.attribute.name, n.attribute.item, n.before, n.after] for n in self.new_sizes
            ],
            "rows": [[r.name, r.before, r.after, r.layers] for r in self.rows],
            "macs": list(self.macs),
            "params": list(self.params),
            "notes": list(self.notes),
        }
        if self.zeros is not None:
            data["masks"] = {
                "zeros": _packed(self.zeros),
                "folds": [[fold.weight, fold.into] for fold in self.folds],
                "inputs": describe_inputs(self.inputs),
            }
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The plan that ``to_dict`` wrote."""
        if data.get("kind") != KIND or data.get("version") != VERSION:
            raise CheckpointError(
                f"expected a {KIND} plan of version {VERSION}, got kind {data.get('kind')!r}, "
                f"version {data.get('version')!r}"
            )
        try:
            masks = data.get("masks")
            return cls(
                cuts=_unpacked(data["cuts"]),
                new_sizes=tuple(
                    NewAttribute(attribute=Attribute(module=m, name=n, item=i), before=b, after=a)
                    for m, n, i, b, a in data.get("new_sizes", ())
                ),
                shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
                rows=tuple(GroupRow(name=n, before=b, after=a, layers=k) for n, b, a, k in data["rows"]),
                macs=(data["macs"][0], data["macs"][1]),
                params=(data["params"][0], data["params"][1]),
                notes=tuple(data.get("notes", ())),
                zeros=None if masks is None else _unpacked(masks["zeros"]),
                folds=() if masks is None else tuple(Fold(weight=weight, into=into) for weight, into in masks["folds"]),
                inputs=() if masks is None else described_inputs(masks["inputs"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}") from error

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


def _renamed(cuts: Iterable[Cut], model: nn.Module) -> list[Cut]:
    names = {plain_name(name): name for name, _ in named_states(model)}
    return [dataclasses.replace(cut, name=names[cut.name]) for cut in cuts]


def _packed(cuts: Iterable[Cut]) -> list[list[Any]]:
    return [[c.name, c.dim, c.blocks, pack_ranges(c.keep), c.role] for c in cuts]


def _unpacked(data: Any) -> tuple[Cut, ...]:
    return tuple(Cut(name=n, dim=d, blocks=b, keep=unpack_ranges(keep), role=role) for n, d, b, keep, role in data)
