# SPDX-License-Identifier: Apache-2.0
"""Proof that a pruned model is the model: compared in float64 with a twin whose removed channels are silenced.

The twin knows only (parameter, dim, indices), never the graph: all entries that the plan removes are set
to 0 in the full-size model, and norms that average over channels average over the kept ones.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import TraceError
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.pruning.double_precision import double_copy
from fxslim.pruning.observed_runs import MODEL, Observation, modules_at, observe
from fxslim.pruning.silencing import NormsOverKept, silence, with_plain_weights

# Relative to the largest output of the twin.
TOLERANCE = 1e-9
VISIBLE = 1e-3
DECISIONS = "decisions"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """``ok``: equal within 1e-9 of the largest output, and the removal is visible in it at all."""

    ok: bool
    max_abs_diff: float
    relative: float
    effect: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "NOT equal" if self.relative > TOLERANCE else "VACUOUS"
        text = f"{verdict}: relative difference {self.relative:.1e}, effect of the removal {self.effect:.1e}"
        return "\n".join([text, *self.notes])


def _whole(model: nn.Module, example: Inputs, training: bool, at: Sequence[str]) -> Observation:
    try:
        return observe(model, example.in_double(), training=training, at=at)
    except Exception as error:
        raise TraceError(
            f"verify compares in float64, and the model's own forward fails there with {example}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _largest(value: Tensor) -> float:
    """The largest finite magnitude; fill values such as the dtype's minimum do not count."""
    finite = value[value.isfinite() & (value.abs() < 1e30)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Equal infinities do not differ; NaN in outputs is refused before, elsewhere it is in the same places."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    return float(torch.nan_to_num((a - b)[differ], nan=float("inf")).abs().max()) if differ.any() else 0.0


def _broken(note: str) -> Verification:
    infinite = float("inf")
    return Verification(ok=False, max_abs_diff=infinite, relative=infinite, effect=infinite, notes=(note,))


class _Comparison:
    """The largest differences so far, what they are of, and how large the effect of the removal is."""

    def __init__(self) -> None:
        self.worst, self.relative, self.effect = 0.0, 0.0, 0.0
        self.notes: dict[str, None] = {}
        self.compared: Counter[str] = Counter()

    def compare(self, want: Observation, got: Observation) -> None:
        """Each tensor by its own scale: a large one must not hide an error in another."""
        if len(want.outputs) != len(got.outputs):
            self._differ(f"the pruned model returns {len(got.outputs)} tensors, not {len(want.outputs)}")
        for (where, b), (_, c) in zip(want.outputs, got.outputs, strict=False):
            self.compared[where] += 1
            if b.shape != c.shape:
                named = f" of {where}" if where != MODEL else ""
                self._differ(f"output shapes{named} differ: {tuple(b.shape)}, pruned {tuple(c.shape)}")
            if not b.numel():
                self.notes[f"an output of {where} has no entries: what makes it was not compared"] = None
            if unknown := int(b.isnan().sum()):
                self._differ(f"{unknown} of {b.numel()} entries that {where} returns are NaN and can't be compared")
            self._add(b, c)
        if got.repeated is not None:
            for b, c in got.repeated.compared:
                self._add(b, c)
            self.compared[DECISIONS] += got.repeated.next
            if got.repeated.strayed:
                self.notes[f"the pruned model decides other things: {got.repeated.strayed}"] = None

    def _differ(self, note: str) -> None:
        self.notes[note] = None
        self.worst = self.relative = float("inf")

    def _add(self, b: Tensor, c: Tensor) -> None:
        if b.numel() and b.shape == c.shape:
            difference = _largest_difference(b, c)
            self.worst = max(self.worst, difference)
            self.relative = max(self.relative, difference / max(_largest(b), 1e-300))

    def see_effect(self, whole: Observation, twin: Observation) -> None:
        """What the removal changes in what is compared."""
        for (_, a), (_, b) in zip(whole.outputs, twin.outputs, strict=False):
            if a.shape == b.shape:
                # Where decisions are not its own, the original may divide by 0.
                both = a.isfinite() & b.isfinite()
                self.effect = max(self.effect, _largest(a[both] - b[both]) / max(_largest(a), 1e-300))

    def outcome(self, must_be_seen: bool) -> Verification:
        notes = list(self.notes)
        vacuous = must_be_seen and self.effect < VISIBLE
        if vacuous:
            notes.append(
                f"VACUOUS: removing everything changes the output by only {self.effect:.1e}, so it proves little"
            )
        if any(count for where, count in self.compared.items() if where != MODEL):
            parts = [f"outputs of the model: {self.compared.pop(MODEL, 0)}"]
            if taken := self.compared.pop(DECISIONS, 0):
                parts.append(f"the values behind {taken} decisions, which were the twin's")
            named = [f"{count} outputs of {where}" for where, count in self.compared.items()]
            parts += named[:4] + [f"those of {len(named) - 4} more"] * (len(named) > 4)
            notes.append("compared: " + ", ".join(parts))
        return Verification(
            ok=self.relative <= TOLERANCE and not vacuous,
            max_abs_diff=self.worst,
            relative=self.relative,
            effect=self.effect,
            notes=tuple(notes),
        )


def verify_cuts(
    model: nn.Module,
    cuts: list[Cut],
    inputs: Any,
    *,
    new_sizes: Sequence[NewAttribute] = (),
    zeros: list[Cut] | None = None,
    values: Mapping[str, Tensor] | None = None,
    at: Iterable[str] = (),
    train_inputs: Any = None,
) -> Verification:
    """Compare the pruned model with its silenced twin on each example input, in train mode on ``train_inputs``.

    ``zeros`` are the entries that are 0 in the twin where these are not all that are cut, as with masks: their
    removal should change nothing, so it need not be visible. ``values`` are put in before the cut.
    """
    at = modules_at(model, at)
    original, twin, pruned = (double_copy(model) for _ in range(3))
    # The twin's own weights, so that a wrong gain in the pruned model is seen.
    silent = with_plain_weights(twin, cuts if zeros is None else zeros)
    silence(twin, silent)
    try:
        Surgery(pruned, cuts, new_sizes=new_sizes, values=values).commit(Changes())
    except Exception as error:
        return _broken(f"the cuts can't be made: {type(error).__name__}: {error}")
    norms = NormsOverKept(twin, silent if zeros is None else ())
    comparison = _Comparison()
    runs = [(example, False) for example in as_inputs(inputs)]
    runs += [(example, True) for example in ([] if train_inputs is None else as_inputs(train_inputs))]
    for example, training in runs:
        wide, whole = example.in_double(), _whole(original, example, training, at)
        with norms:
            want = observe(twin, wide, training=training, at=at)
        try:
            got = observe(pruned, wide, training=training, at=at, decisions=want.decisions)
        except Exception as error:
            return _broken(f"the pruned model does not run: {type(error).__name__}: {error}")
        if whole.shapes != want.shapes:
            # Other boxes were found: the same ones are comparable.
            whole = observe(original, wide, training=training, at=at, decisions=want.decisions)
        comparison.compare(want, got)
        comparison.see_effect(whole, want)
    return comparison.outcome(must_be_seen=zeros is None)
