# SPDX-License-Identifier: Apache-2.0
"""PruningPlan: which entries of which parameters stay; structure only, saved as JSON."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.errors import PlanError, TraceError
from fxslim.graph.inputs import Inputs
from fxslim.graph.model_state import ModelState
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.unweighted_norms import find_unweighted_norms
from fxslim.graph.weight_norms import find_weight_norms
from fxslim.graph.width_scales import Scaling
from fxslim.plan.applied_plans import names_in, plain_name, remember_plan
from fxslim.plan.cut_fields import pack_cuts, unpack_cuts
from fxslim.plan.plan import Plan, Shapes
from fxslim.pruning.channel_masking import ChannelMask, mask_of
from fxslim.pruning.constant_folding import Fold, folded_values
from fxslim.pruning.example_shapes import describe_inputs, described_inputs
from fxslim.pruning.plan_fields import (
    pack_scalings,
    unpack_folds,
    unpack_scalings,
    unpack_sizes,
)
from fxslim.pruning.removals import kept_norms, silent_entries
from fxslim.pruning.repair.mending import UNREPAIRED, Mending
from fxslim.pruning.repair.settings import Repair, pack_repair, unpack_repair
from fxslim.pruning.scaling import renamed_scalings, scaled_values
from fxslim.pruning.verification import Verification, verify_cuts
from fxslim.pruning.weight_masks import WeightMasks


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One line of a plan's table."""

    name: str
    before: int
    after: int
    layers: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningPlan(Plan):
    """What to remove from a model with exactly these parameter shapes.

    ``cuts`` are kept indices in the coordinates of the model that the plan is applied to. Printing a plan gives
    a table of groups with their channels before and after, and the cost before and after.

    ``apply`` removes the channels. Gradients and what ``optimizer`` keeps for the parameters are cut alike, so training
    goes on; losses that were computed before can't be walked backward any more. ``values=False`` folds no constants and
    repairs nothing. A repair reads ``data`` by ``forward``, as in ``plan_pruning``. A mask of this plan is taken away
    with its channels.
    """

    kind = "pruning"
    reads_data = True

    cuts: tuple[Cut, ...]
    shapes: Shapes
    rows: tuple[GroupRow, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    # Sizes that the user's own modules keep as attributes and read in their forward.
    new_sizes: tuple[NewAttribute, ...] = ()
    # Make up for numbers that the forward computes from widths, such as the scale of attention.
    scalings: tuple[Scaling, ...] = ()
    # Made from masks: entries that they make 0, and constants to fold. None: whatever is removed counts as 0.
    zeros: tuple[Cut, ...] | None = None
    folds: tuple[Fold, ...] = ()
    # What the user should know: paths that the example inputs did not take.
    notes: tuple[str, ...] = ()
    # Kept from planning: a forward on them must succeed before anything is final. Not saved.
    inputs: tuple[Inputs, ...] = ()
    # The same for train mode, where it was given.
    train_inputs: tuple[Inputs, ...] = ()
    # What apply mends afterwards.
    repair: Repair | None = None
    # Kept from planning, for the repair. Not saved.
    data: Data | None = None

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

    def change_model(
        self,
        model: nn.Module,
        changes: Changes,
        optimizer: Optimizer | None = None,
        *,
        values: bool = True,
        data: Data | None = None,
    ) -> None:
        model, names = self._names_in(model)
        cuts, mask = _renamed(self.cuts, names), self._own_mask(model, names)
        mending = Mending.planned(self.repair, data, self.data) if values else None
        with torch.inference_mode(False):
            changes.on_undo(ModelState(model).restore)
            start = self._values(model, names) if values else {}
            if mending is not None:
                start |= mending.weights(model, cuts, self.new_sizes, renamed_scalings(self.scalings, names), changes)
            surgery = Surgery(model, cuts, optimizer, new_sizes=self.new_sizes, values=start)
            if mask is not None:
                changes.make(functools.partial(mask.detach, model), functools.partial(mask.attach_again, model))
            surgery.commit(changes)
            self._try_forwards(model, changes)
            if mending is not None:
                mending.mend_norms(model, [surgery.states[name] for name in surgery.cuts], changes)
            # Data stay out of the model: copies of it would copy them.
            remember_plan(model, self if self.data is None else dataclasses.replace(self, data=None), changes)
            surgery.close_old_graphs(changes)

    def _try_forwards(self, model: nn.Module, changes: Changes) -> None:
        """Run the model on the plan's example inputs; one that fails uncut too is not the plan's fault."""
        has_values = not any(parameter.is_meta for parameter in model.parameters())
        tries = [(inputs, False) for inputs in self.inputs] + [(inputs, True) for inputs in self.train_inputs]
        for inputs, training in tries:
            failure = _failure(model, inputs, training) if has_values and inputs.have_values else None
            if failure is None:
                continue
            changes.undo()
            uncut = _failure(model, inputs, training)
            if uncut is not None:
                raise TraceError(
                    f"the model's own forward fails on the plan's example inputs {inputs} (nothing was changed): "
                    f"{type(uncut).__name__}: {uncut}"
                ) from uncut
            raise PlanError(
                f"the pruned model's forward failed{' in train mode' * training} "
                f"({type(failure).__name__}: {failure}); it reads a size that is written as a number. "
                "Nothing was changed. Name the layers around it in skip="
            ) from failure

    def mask(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
        """Hold what the plan removes at 0 while the model trains; ``apply`` removes it later. Returns the model.

        The masked model computes what the pruned one would, in training too. Its class, its parameters and
        their names stay; the masked entries are 0 in every ``state_dict()`` and their gradients are 0. With
        ``optimizer`` what it keeps for them is set to 0 as well, so that they stay 0 between a step and the next
        forward too. The mask itself is no part of the state: mask a model again after its state was loaded.
        Only the model's own forward is masked, not one of its submodules called alone.
        """
        inner, names = self._names_in(model)
        mask = self._own_mask(inner, names)
        if mask is None:
            states = dict(named_states(inner))
            for name, value in self._with_kept_norms(inner, names, self._folded(inner, names)).items():
                states[name].data.copy_(value)
            mask = ChannelMask(inner, tuple(_renamed(self.cuts, names)))
            mask.attach(inner)
        if optimizer is not None:
            mask.mute_optimizer(inner, optimizer)
        return model

    def unmask(self, model: nn.Module) -> nn.Module:
        """Take the mask away; entries that were masked start from 0. Returns the model."""
        inner, names = self._names_in(model)
        mask = self._own_mask(inner, names)
        if mask is None:
            raise PlanError("the model is not masked: call plan.mask(model) first")
        mask.detach(inner)
        return model

    def _names_in(self, model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
        """The model inside of a compile wrapper, and its own names of everything that the plan knows."""
        refuse_wrapped(model)
        model = without_compile_wrapper(model)
        norms = [name for name, _, _ in find_unweighted_norms(model)]
        own = {name: name for name in norms} | {plain_name(name): name for name in norms}
        return model, own | names_in(model, self.shapes)

    def _own_mask(self, model: nn.Module, names: Mapping[str, str]) -> ChannelMask | None:
        """The mask of this plan on a model; another plan's is refused."""
        mask = mask_of(model)
        if mask is not None and mask.cuts != tuple(_renamed(self.cuts, names)):
            raise PlanError(
                "the model is masked by another plan: apply that one, or take it away with its unmask(model)"
            )
        return mask

    def _folded(self, model: nn.Module, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        if self.zeros is None:
            return {}
        if not self.inputs:
            raise PlanError(
                "the plan was made from masks and has no example inputs, which are needed to find the constants that "
                "masked channels give: make it again with from_masks, or apply it with values=False and load a state"
            )
        folds = [Fold(weight=names[fold.weight], into=names[fold.into]) for fold in self.folds]
        return folded_values(model, _renamed(self.cuts, names), _renamed(self.zeros, names), folds, self.inputs)

    def _values(self, model: nn.Module, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Full-size values that the cut model starts from where they are not the model's own."""
        values = scaled_values(model, renamed_scalings(self.scalings, names), self._folded(model, names))
        return self._with_kept_norms(model, names, values)

    def _with_kept_norms(
        self, model: nn.Module, names: Mapping[str, str], values: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        norms = find_weight_norms(model)
        if not norms:
            return dict(values)
        states = dict(named_states(model))
        return kept_norms(norms, states, silent_entries(_renamed(self.cuts, names), states, norms), values)

    def verify(
        self, model: nn.Module, inputs: Any, *, at: Iterable[str] = (), train_inputs: Any = None
    ) -> Verification:
        """Prove that the pruned model computes what the model computes with the removed channels silenced.

        ``at``: names and globs of modules whose outputs are compared too, such as a detector's heads, whose boxes
        are chosen afterwards. ``train_inputs`` are compared in train mode, without dropout.
        A plan made from masks: what the model computes with the masked entries at 0. Without the plan's repair.
        """
        model, names = self._names_in(model)
        with torch.inference_mode(False):
            outcome = verify_cuts(
                model,
                _renamed(self.cuts, names),
                inputs,
                new_sizes=self.new_sizes,
                zeros=None if self.zeros is None else _renamed(self.zeros, names),
                values=self._values(model, names),
                at=at,
                train_inputs=train_inputs,
            )
        if self.repair is not None:
            outcome = dataclasses.replace(outcome, notes=(*outcome.notes, UNREPAIRED))
        return outcome

    def _to_fields(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "cuts": pack_cuts(self.cuts),
            "new_sizes": [
                [n.attribute.module, n.attribute.name, n.attribute.item, n.before, n.after] for n in self.new_sizes
            ],
            "scalings": pack_scalings(self.scalings),
            "rows": [[r.name, r.before, r.after, r.layers] for r in self.rows],
            "macs": list(self.macs),
            "params": list(self.params),
            "notes": list(self.notes),
        }
        if self.zeros is not None:
            data["masks"] = {
                "zeros": pack_cuts(self.zeros),
                "folds": [[fold.weight, fold.into] for fold in self.folds],
                "inputs": describe_inputs(self.inputs),
            }
        if self.repair is not None:
            data["repair"] = pack_repair(self.repair)
        return data

    @classmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
        masks = data.get("masks")
        return cls(
            cuts=unpack_cuts(data["cuts"], shapes),
            new_sizes=unpack_sizes(data.get("new_sizes", ())),
            scalings=unpack_scalings(data.get("scalings", ()), shapes),
            shapes=shapes,
            rows=tuple(
                GroupRow(name=str(n), before=int(b), after=int(a), layers=int(k)) for n, b, a, k in data["rows"]
            ),
            macs=(int(data["macs"][0]), int(data["macs"][1])),
            params=(int(data["params"][0]), int(data["params"][1])),
            notes=tuple(map(str, data.get("notes", ()))),
            zeros=None if masks is None else unpack_cuts(masks["zeros"], shapes),
            folds=() if masks is None else unpack_folds(masks["folds"], shapes),
            inputs=() if masks is None else described_inputs(masks["inputs"]),
            repair=None if "repair" not in data else unpack_repair(data["repair"]),
        )

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


def _failure(model: nn.Module, inputs: Inputs, training: bool) -> Exception | None:
    """What a forward raises, if anything."""
    try:
        with undisturbed(model, training=training), torch.no_grad():
            inputs.copied().run(model)
    except Exception as error:
        return error
    return None


def _renamed(cuts: Iterable[Cut], names: Mapping[str, str]) -> list[Cut]:
    """Cuts with a model's own names, which may have a wrapper's prefix."""
    cuts = list(cuts)
    for cut in cuts:
        if cut.name not in names:
            raise PlanError(f"the plan does not fit this model: it has no {cut.name}, which the plan cuts")
    return [dataclasses.replace(cut, name=names[cut.name]) for cut in cuts]
