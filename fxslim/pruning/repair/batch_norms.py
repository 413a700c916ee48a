# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch norms, estimated anew: the average over batches of what they read."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxslim.batches import Data, Forward, as_data
from fxslim.errors import CalibrationError, ConfigError, unknown_name
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.recording import undisturbed
from fxslim.graph.surgery.changes import Changes
from fxslim.pruning.repair.changed_paths import ChangedPaths


def reestimate_batch_norms(
    model: nn.Module, data: Any, *, forward: Forward | None = None, layers: Iterable[str] | None = None
) -> list[str]:
    """Give batch norms the statistics of this data; names of those that got new ones. After any error nothing changed.

    Means and variances of the batches are averaged, each batch alike, while these layers normalize by the batch, as
    in training, and everything else is in eval mode. ``layers`` are all batch norms that keep statistics and are not
    frozen (in eval mode while the model trains, or without gradient while other parameters have one).

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batch_norms(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]])])
    ['0']
    >>> net[0].running_mean, net[0].running_var
    (tensor([3.]), tensor([5.]))
    """
    free = free_norms(model)
    if layers is not None:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in free:
                raise ConfigError("layers: " + unknown_name("batch norm that keeps statistics", name, free))
        free = {name: free[name] for name in names}
    changes = Changes()
    try:
        return change_statistics(model, free, as_data(data, forward), changes)
    except BaseException:
        changes.undo()
        raise


def free_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms that keep statistics and are not frozen."""
    trained = any(p.requires_grad for p in model.parameters())
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
            continue
        own = list(layer.parameters(recurse=False))
        fixed = trained and bool(own) and not any(p.requires_grad for p in own)
        if not fixed and not (model.training and not layer.training):
            found[name] = layer
    return found


def change_statistics(
    model: nn.Module,
    norms: dict[str, _BatchNorm],
    data: Data,
    changes: Changes,
    changed: Iterable[Tensor] | None = None,
) -> list[str]:
    """Estimate and put in; with ``changed`` only norms that read what was computed from these, or are among them."""
    changes.on_undo(ModelState(model).restore)
    changes.on_undo(HookState(model).restore)
    averages = _Averages(norms, changed)
    with undisturbed(model, training=False), torch.no_grad(), averages.collecting():
        for averages.batch, batch in enumerate(data):
            with averages.paths or contextlib.nullcontext():
                data.forward(model, batch)
    for name, (mean, variance, count) in averages.found.items():
        layer = norms[name]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        for state, value in ((layer.running_mean, mean), (layer.running_var, variance)):
            changes.replace_data(state, (value / count).to(state.dtype), None)
        if layer.num_batches_tracked is not None:
            batches = torch.full_like(layer.num_batches_tracked, averages.batch + 1)
            changes.replace_data(layer.num_batches_tracked, batches, None)
    return list(averages.found)


class _Averages:
    """Sums of the statistics of each call, in float64; the layers normalize by the batch meanwhile."""

    def __init__(self, norms: dict[str, _BatchNorm], changed: Iterable[Tensor] | None) -> None:
        self.norms = norms
        self.states = None if changed is None else list(changed)
        self.paths = None if self.states is None else ChangedPaths(self.states)
        self.found: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.batch = 0

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Listen, in train mode with a momentum that leaves the buffers as they are."""
        before = [(layer, layer.momentum) for layer in self.norms.values()]
        handles = []
        try:
            for name, layer in self.norms.items():
                layer.momentum = 0.0

                def see(layer: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    self._see(name, layer, args[0] if args else kwargs["input"])

                handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
            yield
        finally:
            for layer, momentum in before:
                layer.momentum = momentum
            for handle in handles:
                handle.remove()

    def _see(self, name: str, layer: _BatchNorm, x: Tensor) -> None:
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if self.paths is not None and not self.paths.reach([x, *own]):
            return
        count = x.numel() // max(1, x.shape[1])
        if count < 2:
            raise CalibrationError(
                f"repair: {name} reads {count} value of each channel in batch {self.batch} of data: "
                "its variance needs two or more, so give larger batches"
            )
        variance, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1])
        if not (variance.isfinite().all() and mean.isfinite().all()):
            raise CalibrationError(
                f"repair: {name} reads NaN or infinity in batch {self.batch} of data: mend the data or the weights"
            )
        layer.train()
        before = self.found.get(name)
        if before is not None:
            mean, variance = mean + before[0], variance + before[1]
        self.found[name] = mean, variance, 1 + (before[2] if before else 0)
