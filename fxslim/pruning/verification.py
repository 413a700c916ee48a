# SPDX-License-Identifier: Apache-2.0
"""Proof that a pruned model is the model: compared in float64 with a twin whose removed channels are silenced.

The twin knows only (parameter, dim, indices), never the graph: all entries that the plan removes are set
to 0 in the full-size model, and norms that average over channels average over the kept ones.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fxslim.graph.inputs import Inputs, as_inputs, output_tensors
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.unweighted_norms import find_unweighted_norms

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
    with undisturbed(model, training=False), torch.no_grad():
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
            state = states.get(cut.name)
            if state is None:
                # A norm without parameters has no values.
                continue
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
    """Norms whose weight is cut average over the kept channels only, as they will in the pruned model.

    A norm without a weight gets one of ones, which changes nothing and makes it known.
    """

    FUNCTIONS = ("layer_norm", "rms_norm", "group_norm")

    def __init__(self, model: nn.Module, cuts: list[Cut]) -> None:
        super().__init__()
        states = dict(named_states(model))
        for name, module, attribute in list(find_unweighted_norms(model)):
            if attribute != "num_features" and any(cut.name == name for cut in cuts):
                module.weight = nn.Parameter(next(model.parameters()).new_ones(getattr(module, attribute)))
                states[name] = module.weight
        self.kept = {id(states[cut.name]): (cut.dim, torch.tensor(cut.keep)) for cut in cuts if cut.name in states}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if name not in self.FUNCTIONS or id(weight) not in self.kept:
            return func(*args, **kwargs)
        x, groups_or_shape = args[0], args[1]
        in_weight, index = self.kept[id(weight)]
        index = index.to(x.device)
        dim = 1 if name == "group_norm" else x.dim() - weight.dim() + in_weight
        part = x.index_select(dim, index)
        second = groups_or_shape if name == "group_norm" else part.shape[x.dim() - weight.dim() :]

        def cut(value: Any) -> Any:
            return value.index_select(in_weight, index) if isinstance(value, Tensor) else value

        rest, named = [cut(value) for value in args[2:]], {key: cut(value) for key, value in kwargs.items()}
        return torch.zeros_like(x).index_copy(dim, index, func(part, second, *rest, **named))


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; attributes that hang in an autograd graph, such as weight norm's weight, are copied by value."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    inner = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in inner})


def _broken(note: str) -> Verification:
    infinite = float("inf")
    return Verification(ok=False, max_abs_diff=infinite, relative=infinite, effect=infinite, notes=(note,))


def verify_cuts(model: nn.Module, cuts: list[Cut], inputs: Any, new_sizes: Sequence[NewAttribute] = ()) -> Verification:
    """Compare the pruned model with its silenced twin on each example input."""
    original, twin, pruned = (_copied(model).double() for _ in range(3))
    silence(twin, cuts)
    try:
        Surgery(pruned, cuts, new_sizes=new_sizes).commit()
    except Exception as error:
        return _broken(f"the cuts can't be made: {type(error).__name__}: {error}")
    norms = NormsOverKept(twin, cuts)
    worst, relative, effect = 0.0, 0.0, 0.0
    notes: list[str] = []
    for example in as_inputs(inputs):
        wide = Inputs(*tree_map(_in_double, example.args), **tree_map(_in_double, example.kwargs))
        whole = outputs_of(original, wide)
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
    if effect < VISIBLE:
        notes.append(f"VACUOUS: removing everything changes the output by only {effect:.1e}, so it proves little")
    return Verification(
        ok=relative <= TOLERANCE and effect >= VISIBLE,
        max_abs_diff=worst,
        relative=relative,
        effect=effect,
        notes=tuple(notes),
    )
