# SPDX-License-Identifier: Apache-2.0
"""Least squares: layers that lose inputs get the weights whose outputs come nearest to those of the original."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxslim.batches import Data
from fxslim.errors import CalibrationError
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.surgery.cutting import Cut, cut_tensor
from fxslim.graph.width_scales import Scaling
from fxslim.pruning.repair.fitted_layers import LayerFit
from fxslim.pruning.repair.listening import Listener
from fxslim.pruning.repair.moments import Moments, add_products, refitted
from fxslim.pruning.repair.settings import Repair
from fxslim.pruning.scaling import scaled_values

# With fewer rows, least squares fits to their accidents: what it mends on them it breaks on others.
ROWS_PER_UNKNOWN = 2
NOT_CALLED = "no batch of data calls it as a layer"
Values = dict[str, Tensor]


def refit_to_original(
    model: nn.Module, fits: Iterable[LayerFit], repair: Repair, data: Data
) -> tuple[Values, dict[str, str]]:
    """New full-size values of weights and biases, and why layers are left; each layer by what it reads in the model.

    As many layers at a time as the limit allows, each time all of the data.
    """
    values: Values = {}
    left: dict[str, str] = {}
    for together in _by_size(fits, repair):
        products: dict[str, Tensor] = {}

        def hear(fit: LayerFit, call: int, rows: Tensor, products: dict[str, Tensor] = products) -> None:
            products[fit.name] = add_products(products.get(fit.name), rows, rows)

        listener = Listener(together, repair, hear)
        with undisturbed(model, training=False), torch.no_grad(), listener.at(model, check=True):
            for number, batch in enumerate(data):
                listener.start_batch(number)
                data.forward(model, batch)
        left |= listener.refused
        for fit in together:
            if fit.name in products and fit.name not in left:
                values |= new_values(fit, Moments.of_original(products.pop(fit.name), fit.kept), left)
            else:
                left.setdefault(fit.name, NOT_CALLED)
    return values, left


def refit_in_order(
    model: nn.Module,
    pruned: nn.Module,
    fits: Sequence[LayerFit],
    repair: Repair,
    data: Data,
    cuts: Iterable[Cut],
    scalings: Iterable[Scaling] = (),
) -> tuple[Values, dict[str, str]]:
    """The same by what each layer reads in a pruned copy, layer after layer; the copy gets the new values."""
    values: Values = {}
    left: dict[str, str] = {}
    states, by_name = dict(named_states(pruned)), dict[str, list[Cut]]()
    for cut in cuts:
        by_name.setdefault(cut.name, []).append(cut)
    for together in _in_order(model, fits, repair, data, left):
        moments, refused = _moments_of_both(model, pruned, together, repair, data)
        left |= refused
        found: Values = {}
        for fit in together:
            if fit.name in moments and fit.name not in left:
                found |= new_values(fit, moments[fit.name], left)
        values |= found
        for name, value in scaled_values(model, [one for one in scalings if one.name in found], found).items():
            with torch.no_grad():
                states[name].copy_(cut_tensor(value, by_name.get(name, [])))
    return values, left


def _moments_of_both(
    model: nn.Module, pruned: nn.Module, fits: Sequence[LayerFit], repair: Repair, data: Data
) -> tuple[dict[str, Moments], dict[str, str]]:
    kept: dict[str, Tensor] = {}
    cross: dict[str, Tensor] = {}
    originals: dict[tuple[str, int], Tensor] = {}

    def hear_original(fit: LayerFit, call: int, rows: Tensor) -> None:
        originals[fit.name, call] = rows

    def hear_pruned(fit: LayerFit, call: int, rows: Tensor) -> None:
        whole = originals.pop((fit.name, call), None)
        if whole is None or whole.shape[:2] != rows.shape[:2]:
            second.refused[fit.name] = "the pruned model calls it otherwise: use inputs='original'"
            return
        kept[fit.name] = add_products(kept.get(fit.name), rows, rows)
        cross[fit.name] = add_products(cross.get(fit.name), rows, whole)

    first, second = Listener(fits, repair, hear_original), Listener(fits, repair, hear_pruned)
    with undisturbed(model, training=False), undisturbed(pruned, training=False), torch.no_grad():
        for number, batch in enumerate(data):
            again = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, batch)
            first.start_batch(number)
            second.start_batch(number)
            # Both draw the same random numbers.
            with first.at(model, check=True), torch.random.fork_rng():
                data.forward(model, batch)
            with second.at(pruned):
                data.forward(pruned, again)
            for name, _ in originals:
                second.refused.setdefault(name, "the pruned model calls it otherwise: use inputs='original'")
            originals.clear()
    refused = second.refused | first.refused
    return {name: Moments(kept=kept[name], cross=cross[name]) for name in kept if name not in refused}, refused


def new_values(fit: LayerFit, moments: Moments, told: dict[str, str]) -> Values:
    """A layer's weight and bias, full-size in float64.

    By channel where there is little data; none where there is too little for that.
    """
    rows, unknowns = moments.num_rows, fit.kept.shape[1]
    coarse = fit.by_channel()
    if rows < ROWS_PER_UNKNOWN * unknowns and fit.taps == 1 < coarse.taps:
        fit, moments = coarse, moments.by_channel(coarse.taps)
        told[fit.name] = f"fitted by channel: {rows} sampled rows are few for {unknowns} inputs; give more data"
        unknowns = fit.kept.shape[1]
    if rows < ROWS_PER_UNKNOWN * unknowns:
        told[fit.name] = f"left: {rows} sampled rows are too few for {unknowns} inputs; give more data"
        return {}
    weight, bias = fit.layer.weight.detach(), fit.layer.bias
    shaped = weight.reshape(fit.groups, -1, fit.columns, fit.taps)
    shaped_bias = None if bias is None else bias.detach().reshape(fit.groups, -1)
    new_weight, new_bias = refitted(shaped, shaped_bias, moments, fit.kept)
    values = {fit.cut.name: new_weight.reshape(weight.shape)}
    if new_bias is not None:
        values[f"{fit.name}.bias".lstrip(".")] = new_bias.flatten()
    for name, value in values.items():
        if not value.isfinite().all():
            raise CalibrationError(f"repair: {name} of the model has NaN or infinity: mend it before pruning")
    return values


def _by_size(fits: Iterable[LayerFit], repair: Repair) -> Iterator[list[LayerFit]]:
    """As many layers together as the limit allows."""
    together: list[LayerFit] = []
    size = 0
    for fit in fits:
        more = fit.size_bytes(repair.inputs)
        if together and size + more > repair.limit_bytes:
            yield together
            together, size = [], 0
        together.append(fit)
        size += more
    if together:
        yield together


def _in_order(
    model: nn.Module, fits: Sequence[LayerFit], repair: Repair, data: Data, left: dict[str, str]
) -> Iterator[list[LayerFit]]:
    """Layers as they are first called, those that read the same tensor together."""
    steps: list[list[LayerFit]] = []
    last: Tensor | None = None
    met: set[str] = set()
    handles = []
    for fit in fits:

        def meet(layer: nn.Module, args: Any, kwargs: Any, fit: LayerFit = fit) -> None:
            nonlocal last
            x = args[0] if args else kwargs["input"]
            if fit.name not in met:
                met.add(fit.name)
                if x is not last:
                    steps.append([])
                steps[-1].append(fit)
                last = x

        handles.append(fit.layer.register_forward_pre_hook(meet, with_kwargs=True))
    try:
        with undisturbed(model, training=False), torch.no_grad():
            for batch in data:
                data.forward(model, batch)
                break
    finally:
        for handle in handles:
            handle.remove()
    for fit in fits:
        if fit.name not in met:
            left[fit.name] = NOT_CALLED
    for step in steps:
        yield from _by_size(step, repair)
