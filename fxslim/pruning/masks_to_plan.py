# SPDX-License-Identifier: Apache-2.0
"""From masks of weights to a plan that removes what they leave without effect.

A channel can go if every layer that reads it has masked the weights it reads it with, or gets 0, or gets a
constant that can be folded. Whether values are constant is tried, not derived: matrices and kernels are changed
at random, and so are the inputs; what stays one value at every pixel is constant by its structure, not because a
gate happens to be closed. The finished plan is proved on the example inputs.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import PlanError
from fxslim.graph.channel_graph import ChannelGraph, trace
from fxslim.graph.conflicts import Conflict
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.propagation import operator_name
from fxslim.graph.recording import Recording, named_states, record
from fxslim.graph.slots import Slot, entry_sums, owner
from fxslim.graph.surgery.cutting import Cut, cut_tensor
from fxslim.pruning.allocation import Removals
from fxslim.pruning.constant_folding import (
    Consumed,
    Fold,
    consumed_values,
    fold_targets,
    silenced_twin,
)
from fxslim.pruning.layer_limits import GroupLimit
from fxslim.pruning.planning import removal_plan
from fxslim.pruning.pruning_plan import PruningPlan
from fxslim.pruning.weight_masks import WeightMasks, masked_entries

# Factors of the weights in each try; large ones open gates and units that a bias holds closed.
DRAWS = (1.0, 1.0, 10.0)
_AVERAGING = ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm")


def plan_from_masks(model: nn.Module, inputs: Any, masks: WeightMasks) -> PruningPlan:
    """See ``PruningPlan.from_masks``."""
    graph = trace(model, inputs)
    while True:
        plan = _attempt(model, graph, inputs, masks)
        if isinstance(plan, PruningPlan):
            return plan
        graph = graph.without(model, plan)


def _attempt(model: nn.Module, graph: ChannelGraph, inputs: Any, masks: WeightMasks) -> PruningPlan | Conflict:
    """The plan that this graph allows, or what the graph must give up for one."""
    examples, masked = as_inputs(inputs), masked_entries(model, masks)
    whole = {slot.key: _wholly_masked(masked[slot.name], slot) for slot in graph.resolved.slots if slot.name in masked}
    readings = _Readings(model, graph, examples, masked)
    count = len(graph.resolved.classes)
    named = np.zeros(count, dtype=bool)
    for slot in graph.resolved.slots:
        named[graph.resolved.of(slot)[whole.get(slot.key, np.zeros(len(slot.ids), dtype=bool))]] = True
    candidates = named & ~graph.resolved.frozen
    candidates[list(readings.reasons)] = False
    limits = [GroupLimit(at_most=len(group) - 1, allowed=np.ones(len(group) + 1, dtype=bool)) for group in graph.groups]
    removals = Removals(graph, np.zeros(count), limits, blocked=np.flatnonzero(~candidates).tolist())
    kept = removals.kept_after(len(removals.steps))
    arrangement = graph.arranger.arrange(kept)
    if isinstance(arrangement, Conflict):
        return arrangement
    plan = removal_plan(graph, kept, arrangement, inputs)
    zeros = [
        Cut(name=s.name, dim=s.dim, blocks=s.blocks, role=s.role, keep=tuple(np.flatnonzero(~gone).tolist()))
        for s in graph.resolved.slots
        if s.key in whole and (gone := whole[s.key] & ~kept[graph.resolved.of(s)]).any()
    ]
    plan = dataclasses.replace(
        plan,
        zeros=tuple(zeros),
        folds=readings.folds(kept),
        notes=(*plan.notes, *_notes(graph, whole, kept, readings.reasons)),
    )
    _check_the_rest_is_zero(model, plan, masked)
    proof = plan.verify(model, inputs)
    if not proof.ok:
        raise PlanError(f"the plan made from these masks would change the model's outputs, so it is not made: {proof}")
    return plan


def _wholly_masked(gone: Tensor, slot: Slot) -> np.ndarray:
    """Entries of a slot of which nothing is left."""
    return (entry_sums(~gone, slot) == 0).cpu().numpy()


class _Readings:
    """What layers read on changed inputs and weights: classes that must stay and why, constants to fold."""

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, examples: list[Inputs], masked: dict[str, Tensor]
    ) -> None:
        self.graph = graph
        self.reasons: dict[int, str] = {}
        self.constants: dict[tuple[str, int], np.ndarray] = {}
        recordings = [record(model, example) for example in examples]
        self.targets = fold_targets(recordings)
        for name in _averaged_over(recordings):
            self._keep(self.graph.resolved.of(slot) for slot in graph.resolved.slots if slot.name == name)
        twin = _masked_twin(model, masked)
        wide = [example.in_double() for example in examples]
        wide += [larger for example in wide for larger in _larger(example, twin)]
        generator = torch.Generator().manual_seed(0)
        for draw, factor in enumerate(DRAWS):
            if draw:
                twin = _masked_twin(model, masked)
                _change_weights(twin, factor, generator)
            self._read(twin, [*wide, *(_changed(example, generator) for example in wide)], as_they_are=not draw)

    def _keep(self, classes: Any) -> None:
        for some in classes:
            for c in some.tolist():
                self.reasons.setdefault(c, "a norm averages over its channels, so that they count even at 0")

    def _read(self, twin: nn.Module, examples: list[Inputs], as_they_are: bool) -> None:
        consumed = consumed_values(twin, examples)
        states = dict(named_states(twin))
        for slot in self.graph.resolved.slots:
            if slot.role != "consumer":
                continue
            layer = owner(slot.name)
            values = consumed.get(slot.name, Consumed.never(len(slot.ids)))
            weight = states[slot.name].detach()
            is_read = (entry_sums(weight.abs(), slot) != 0).cpu()
            constant = values.constant.cpu()
            self._say(slot, (is_read & ~constant).numpy(), f"{layer} reads values of them that are not constant")
            if as_they_are:
                self._place(slot, values, (is_read & constant & ~values.zero.cpu()).numpy())

    def _place(self, slot: Slot, values: Consumed, folding: np.ndarray) -> None:
        """Where the constants of these entries go."""
        reads = f"{slot.name.rpartition('.')[0]} reads constants of them"
        if values.padded:
            self._say(slot, folding, f"{reads}, with zero padding around: they can't be folded")
        elif slot.name not in self.targets:
            self._say(slot, folding, f"{reads}, with no bias or batch norm of its own to take them")
        else:
            self.constants[slot.key] = folding

    def _say(self, slot: Slot, entries: np.ndarray, why: str) -> None:
        for c in self.graph.resolved.of(slot)[entries].tolist():
            self.reasons.setdefault(c, why)

    def folds(self, kept: np.ndarray) -> tuple[Fold, ...]:
        """The folds that these removals need."""
        return tuple(
            Fold(weight=slot.name, into=self.targets[slot.name])
            for slot in self.graph.resolved.slots
            if slot.key in self.constants and (self.constants[slot.key] & ~kept[self.graph.resolved.of(slot)]).any()
        )


def _averaged_over(recordings: list[Recording]) -> set[str]:
    """Weights and biases of norms that average over channels."""
    nodes = [n for r in recordings for n in r.nodes if n.op == "call_function" and operator_name(n) in _AVERAGING]
    return {str(a.target) for node in nodes for a in node.all_input_nodes if a.op == "get_attr"}


def _masked_twin(model: nn.Module, masked: dict[str, Tensor]) -> nn.Module:
    twin = silenced_twin(model, ())
    states = dict(named_states(twin))
    with torch.no_grad():
        for name, gone in masked.items():
            states[name].masked_fill_(gone, 0)
    return twin


def _change_weights(twin: nn.Module, factor: float, generator: torch.Generator) -> None:
    """Matrices and kernels times 0.5 to 1.5 times the factor, with random signs; what is 0 stays 0.

    Vectors stay: biases and batch norms are what makes the constants.
    """
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) > 1:
                factors = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_((factor * factors * signs).to(parameter.device))


def _larger(example: Inputs, model: nn.Module) -> list[Inputs]:
    """The example with more pixels, and with longer sequences, where the model takes them.

    The mean over pixels of a constant with a border is one number, but another one for each size.
    """

    def longer(value: Tensor, dims: range) -> Tensor:
        for dim in dims:
            wrapped = torch.arange(value.shape[dim] + 3, device=value.device) % value.shape[dim]
            value = value.index_select(dim, wrapped)
        return value

    tried = [
        example.with_tensors(lambda x: longer(x, range(2, x.dim()))),
        example.with_tensors(lambda x: longer(x, range(1, 2)) if x.dim() == 3 else x),
    ]
    found = []
    for larger in tried:
        try:
            consumed_values(model, [larger])
        except Exception:
            # This size is fixed, so nothing can depend on it.
            continue
        found.append(larger)
    return found


def _changed(example: Inputs, generator: torch.Generator) -> Inputs:
    """Noise on floating tensors; other tensors shuffled."""

    def change(value: Tensor) -> Tensor:
        if value.is_floating_point():
            spread = float(value.std()) if value.numel() > 1 else 0.0
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            return value + noise * (spread or 1.0)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.flatten()[order].view(value.shape)

    return example.with_tensors(change)


def _notes(
    graph: ChannelGraph, whole: dict[tuple[str, int], np.ndarray], kept: np.ndarray, reasons: dict[int, str]
) -> list[str]:
    """Channels that a layer makes with masked weights only, and that stay."""
    stay: Counter[tuple[str, str]] = Counter()
    for slot in graph.resolved.slots:
        if slot.key not in whole or slot.role not in ("producer", "depthwise"):
            continue
        classes = graph.resolved.of(slot)
        for c in classes[whole[slot.key] & kept[classes]].tolist():
            why = graph.resolved.reason(c) or reasons.get(c)
            why = why or "one must stay, and parts of equal size (groups, chunks) stay equal"
            stay[owner(slot.name), why] += 1
    return [f"{layer}: {count} masked channels stay: {why}" for (layer, why), count in stay.items()]


def _check_the_rest_is_zero(model: nn.Module, plan: PruningPlan, masked: dict[str, Tensor]) -> None:
    """What is masked inside channels that stay is a value, and values are the model's."""
    states = dict(named_states(model))
    for name, gone in masked.items():
        left = cut_tensor((gone & (states[name] != 0)).float(), [cut for cut in plan.cuts if cut.name == name])
        if left.any():
            raise PlanError(
                f"{name}: {int(left.sum())} weights in channels that stay are masked, but not 0 in this model: a plan "
                "holds structure, not values; set them to 0 first (fxslim.pruning.weight_masks.mask_weights)"
            )
