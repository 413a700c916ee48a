# SPDX-License-Identifier: Apache-2.0
"""Proof that a pruned model is the model: compared in float64 with a twin whose removed channels are silenced.

The twin knows only (parameter, dim, indices), never the graph: all entries that the plan removes are set
to 0 in the full-size model, and norms that average over channels average over the kept ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import TraceError
from fxslim.graph.inputs import Inputs, as_inputs, output_tensors
from fxslim.graph.recording import undisturbed
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.pruning.double_precision import double_copy, in_double
from fxslim.pruning.silencing import NormsOverKept, silence

# Relative to the largest output of the twin.
TOLERANCE = 1e-9
VISIBLE = 1e-3


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


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns, in float64, in eval mode and without gradient."""
    with undisturbed(model, training=False), torch.no_grad(), in_double():
        leaves = output_tensors(inputs.copied().run(model))
    leaves = [torch.view_as_real(value) if value.is_complex() else value for value in leaves]
    return [value.double() for value in leaves]


def _whole_outputs(model: nn.Module, wide: Inputs, example: Inputs) -> list[Tensor]:
    try:
        return outputs_of(model, wide)
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
    """Equal infinities and NaN in the same places do not differ."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    return float(torch.nan_to_num((a - b)[differ], nan=float("inf")).abs().max()) if differ.any() else 0.0


def _broken(note: str) -> Verification:
    infinite = float("inf")
    return Verification(ok=False, max_abs_diff=infinite, relative=infinite, effect=infinite, notes=(note,))


def verify_cuts(
    model: nn.Module,
    cuts: list[Cut],
    inputs: Any,
    *,
    new_sizes: Sequence[NewAttribute] = (),
    zeros: list[Cut] | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> Verification:
    """Compare the pruned model with its silenced twin on each example input.

    ``zeros`` are the entries that are 0 in the twin where these are not all that are cut, as with masks: their
    removal should change nothing, so it need not be visible. ``values`` are put in before the cut.
    """
    original, twin, pruned = (double_copy(model) for _ in range(3))
    silence(twin, cuts if zeros is None else zeros)
    try:
        Surgery(pruned, cuts, new_sizes=new_sizes, values=values).commit(Changes())
    except Exception as error:
        return _broken(f"the cuts can't be made: {type(error).__name__}: {error}")
    norms = NormsOverKept(twin, cuts if zeros is None else ())
    worst, relative, effect, notes = 0.0, 0.0, 0.0, list[str]()
    for example in as_inputs(inputs):
        wide = example.in_double()
        whole = _whole_outputs(original, wide, example)
        try:
            got = outputs_of(pruned, wide)
        except Exception as error:
            return _broken(f"the pruned model does not run: {type(error).__name__}: {error}")
        with norms:
            want = outputs_of(twin, wide)
        # Each output by its own scale: a large one must not hide an error in another.
        for a, b, c in zip(whole, want, got, strict=True):
            if b.shape != c.shape:
                notes.append(f"output shapes differ: {tuple(b.shape)}, pruned {tuple(c.shape)}")
                worst = relative = float("inf")
            elif b.numel():
                difference = _largest_difference(b, c)
                worst, relative = max(worst, difference), max(relative, difference / max(_largest(b), 1e-300))
                effect = max(effect, _largest_difference(a, b) / max(_largest(a), 1e-300))
    vacuous = zeros is None and effect < VISIBLE
    if vacuous:
        notes.append(f"VACUOUS: removing everything changes the output by only {effect:.1e}, so it proves little")
    return Verification(
        ok=relative <= TOLERANCE and not vacuous,
        max_abs_diff=worst,
        relative=relative,
        effect=effect,
        notes=tuple(notes),
    )
