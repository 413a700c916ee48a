# SPDX-License-Identifier: Apache-2.0
"""Proof that a pruned model is the model: compared in float64 with a twin whose removed channels are silenced.

The twin knows only (parameter, dim, indices), never the graph: all entries that the plan removes are set
to 0 in the full-size model, and norms that average over channels average over the kept ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fxslim.errors import TraceError
from fxslim.graph.inputs import Inputs, as_inputs, output_tensors
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.pruning.double_precision import double_copy, in_double

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


def _largest(value: Tensor) -> float:
    """The largest finite magnitude; fill values such as the dtype's minimum do not count."""
    finite = value[value.isfinite() & (value.abs() < 1e30)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Equal infinities and NaN in the same places do not differ."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    return float(torch.nan_to_num((a - b)[differ], nan=float("inf")).abs().max()) if differ.any() else 0.0


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def silence(model: nn.Module, cuts: list[Cut]) -> None:
    """Set every entry that the cuts remove to 0."""
    states = dict(named_states(model))
    with torch.no_grad():
        for cut in cuts:
            state = states[cut.name]
            if cut.blocks > 1:
                _silence_blocks(state, cut)
                continue
            gone = torch.ones(state.shape[cut.dim], dtype=torch.bool, device=state.device)
            gone[list(cut.keep)] = False
            state.movedim(cut.dim, 0)[gone] = 0


def _silence_blocks(state: Tensor, cut: Cut) -> None:
    kept = torch.zeros(cut.blocks * state.shape[1], dtype=torch.bool, device=state.device)
    kept[list(cut.keep)] = True
    kept = kept.view(cut.blocks, 1, state.shape[1], *[1] * (state.dim() - 2))
    state.view(cut.blocks, -1, *state.shape[1:]).mul_(kept)


class NormsOverKept(TorchFunctionMode):
    """Norms whose weight is cut average over the kept channels only, as they will in the pruned model."""

    FUNCTIONS: ClassVar[dict[str, int]] = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1}

    def __init__(self, model: nn.Module, cuts: list[Cut]) -> None:
        super().__init__()
        states = dict(named_states(model))
        self.kept = {id(states[cut.name]): torch.tensor(cut.keep) for cut in cuts if states[cut.name].dim() == 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if name not in self.FUNCTIONS or id(weight) not in self.kept:
            return func(*args, **kwargs)
        x, groups_or_shape = args[0], args[1]
        index = self.kept[id(weight)].to(x.device)
        dim = self.FUNCTIONS[name] % x.dim()
        second = groups_or_shape if name == "group_norm" else [len(index)]
        rest = [p[index] if isinstance(p, Tensor) else p for p in args[2:]]
        cut_kwargs = {k: p[index] if isinstance(p, Tensor) else p for k, p in kwargs.items()}
        part = func(x.index_select(dim, index), second, *rest, **cut_kwargs)
        return torch.zeros_like(x).index_copy(dim, index, part)


def _broken(note: str) -> Verification:
    infinite = float("inf")
    return Verification(ok=False, max_abs_diff=infinite, relative=infinite, effect=infinite, notes=(note,))


def verify_cuts(model: nn.Module, cuts: list[Cut], inputs: Any, new_sizes: Sequence[NewAttribute] = ()) -> Verification:
    """Compare the pruned model with its silenced twin on each example input."""
    original, twin, pruned = (double_copy(model) for _ in range(3))
    silence(twin, cuts)
    try:
        Surgery(pruned, cuts, new_sizes=new_sizes).commit(Changes())
    except Exception as error:
        return _broken(f"the cuts can't be made: {type(error).__name__}: {error}")
    worst, relative, effect = 0.0, 0.0, 0.0
    notes: list[str] = []
    for example in as_inputs(inputs):
        wide = Inputs(*tree_map(_in_double, example.args), **tree_map(_in_double, example.kwargs))
        try:
            whole = outputs_of(original, wide)
        except Exception as error:
            raise TraceError(
                f"verify compares in float64, and the model's own forward fails there with {example}: "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            got = outputs_of(pruned, wide)
        except Exception as error:
            return _broken(f"the pruned model does not run: {type(error).__name__}: {error}")
        with NormsOverKept(twin, cuts):
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
    if effect < VISIBLE:
        notes.append(f"VACUOUS: removing everything changes the output by only {effect:.1e}, so it proves little")
    return Verification(
        ok=relative <= TOLERANCE and effect >= VISIBLE,
        max_abs_diff=worst,
        relative=relative,
        effect=effect,
        notes=tuple(notes),
    )
