# SPDX-License-Identifier: Apache-2.0
"""Chooses the masks of a model whose layers are masked counterparts: all at once, or layer by layer."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxslim.batches import Data
from fxslim.errors import CalibrationError, ConfigError
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.watched_runs import run_all
from fxslim.graph.weight_uses import WeightUse, WeightUses
from fxslim.nn import MaskedWeights, MaskSettings
from fxslim.patterns.weight_layout import layout_of
from fxslim.sparsity.input_statistics import Statistics, gather_statistics
from fxslim.sparsity.loss_gradients import gradient_scores
from fxslim.sparsity.methods import Method, Par
from fxslim.sparsity.methods.method import Seen

# What sums of products may take at a time; more weights need another pass over the data.
_LIMIT_BYTES = 1 << 31


def choose_masks(
    model: nn.Module,
    settings: Mapping[str, MaskSettings],
    method: Method,
    data: Data | None,
    stages: int,
    changes: Changes,
) -> None:
    """Set the mask of each weight, and its values where the method has new ones."""
    weights = {name: Weight(model, name) for name in settings}
    for weight in weights.values():
        weight.check()
    if isinstance(method, Par) and method.version == 2:
        stages = max(1, stages)
    if not stages or data is None:
        found = {}
        for some, seen in seen_by_weight(model, weights, method, data):
            for name in some:
                found[name] = weights[name].choose(method, seen[name], settings[name], 1.0)
        for name, (mask, values) in found.items():
            weights[name].set(mask, values, changes)
        return
    for stage in range(1, stages + 1):
        for some in forward_order(model, list(settings), data):
            for group, seen in seen_by_weight(model, {name: weights[name] for name in some}, method, data):
                for name in group:
                    mask, values = weights[name].choose(method, seen[name], settings[name], stage / stages)
                    weights[name].set(mask, values, changes)


class Weight:
    """One masked weight of a model, as (out, in, *kernel)."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        layer, _, self.attribute = name.rpartition(".")
        self.module: Any = model.get_submodule(layer)
        self.layout = layout_of(self.module)

    @property
    def parameter(self) -> Tensor:
        module = self.module
        return module.stored(self.attribute) if isinstance(module, MaskedWeights) else getattr(module, self.attribute)

    def rows(self) -> Tensor:
        """As the layer computes with it."""
        module = self.module
        value = module.masked(self.attribute) if isinstance(module, MaskedWeights) else self.parameter
        return self.layout.rows(value.detach())

    def check(self) -> None:
        """Weights must have values, and those be numbers."""
        value = self.parameter.detach()
        if value.is_meta:
            raise ConfigError(f"{self.name} is on the meta device and has no values: apply(model, values=False)")
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ConfigError(f"{self.name} has NaN or infinity in {bad} of {value.numel()} entries: mend it, or skip")

    def choose(self, method: Method, seen: Seen, settings: MaskSettings, share: float) -> tuple[Tensor, Tensor | None]:
        pattern = settings.pattern_at(0)
        if share < 1:
            pattern = pattern.gentler(share * (pattern.removed() or 0.0))
        mask, values = method.choose(self.rows(), seen, pattern)
        restored = self.layout.restored
        return restored(mask), None if values is None else restored(values)

    def set(self, mask: Tensor, values: Tensor | None, changes: Changes) -> None:
        if values is not None:
            old = self.parameter.detach().clone()
            new = torch.where(mask, values.to(old.dtype), old)
            if not new.isfinite().all():
                raise CalibrationError(f"{self.name}: the adjusted weights overflow {old.dtype}: give more damping=")
            changes.make(functools.partial(_write, self.parameter, new), functools.partial(_write, self.parameter, old))
        self.module.set_mask(mask, self.attribute)


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value)


def seen_by_weight(
    model: nn.Module, weights: Mapping[str, Any], method: Method, data: Data | None
) -> Iterator[tuple[list[str], dict[str, Seen]]]:
    """What the method looks at, for as many weights at a time as the memory allows."""
    if not method.needs:
        yield list(weights), dict.fromkeys(weights, Seen())
        return
    assert data is not None
    if method.needs == "gradients":
        layouts = {name: weight.layout for name, weight in weights.items()}
        found = gradient_scores(model, data, list(weights))
        yield list(weights), {name: Seen(gradient=layouts[name].rows(found[name])) for name in weights}
        return
    squares = method.needs == "squares"
    for some in _affordable(weights, squares):
        pairs = {name: (weights[name].module, weights[name].parameter) for name in some}
        statistics: Statistics = gather_statistics(model, data, pairs, squares_only=squares)
        yield some, {name: Seen(parts=tuple(statistics[name])) for name in some}


def _affordable(weights: Mapping[str, Any], squares: bool) -> Iterator[list[str]]:
    some: list[str] = []
    total = 0
    for name, weight in weights.items():
        columns = weight.rows()[0].numel()
        needed = 0 if squares else columns * columns * weight.layout.groups * weight.parameter.element_size()
        if some and total + needed > _LIMIT_BYTES:
            yield some
            some, total = [], 0
        some.append(name)
        total += needed
    yield some


def forward_order(model: nn.Module, names: Sequence[str], data: Data) -> list[list[str]]:
    """Weights in the order in which they are first used, those that read the same tensor together."""
    states = dict(model.named_parameters())
    order: list[list[str]] = []
    read: list[int] = []
    placed: set[str] = set()

    def hear(use: WeightUse) -> None:
        if use.name in placed:
            return
        placed.add(use.name)
        memory = use.x.untyped_storage()._cdata
        if read and read[-1] == memory:
            order[-1].append(use.name)
        else:
            order.append([use.name])
            read.append(memory)

    uses = WeightUses(model, {name: states[name] for name in names if name in states}, hear)
    run_all(model, data, uses, lambda number: None)
    left = [name for name in names if name not in placed]
    return [*order, left] if left else order


def mute_optimizer(
    model: nn.Module, settings: Mapping[str, MaskSettings], optimizer: Optimizer | None, changes: Changes
) -> None:
    """Momentum from before moves no masked weight."""
    if optimizer is None:
        return
    for name in settings:
        layer, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(layer)
        weight, mask = module.stored(attribute), getattr(module, attribute + "_mask")
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                old = value.clone()
                changes.make(
                    functools.partial(value.masked_fill_, ~mask.to(value.device), 0),
                    functools.partial(value.copy_, old),
                )
