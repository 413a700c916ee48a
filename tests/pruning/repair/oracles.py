# SPDX-License-Identifier: Apache-2.0
"""A small model and its data; least squares by the book: all rows at once, by torch.linalg.lstsq."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from fxslim.pruning.repair.settings import Repair

ALL_PLACES = 1 << 30


def least_squares(inputs: str = "pruned", **changes: Any) -> Repair:
    return Repair(steps=("least_squares",), inputs=inputs, **({"num_positions": ALL_PLACES} | changes))


def deep() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(72, 4),
    ).double().eval()  # fmt: skip


IMAGES = [torch.randn(50, 2, 8, 8).double() for _ in range(4)]


def design(layer: nn.Module, x: Tensor) -> Tensor:
    """All that each output reads, groups x rows x columns: a convolution whose filters are single ones."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    per_group = layer.weight.shape[1]
    parts = []
    for part in x.split(per_group, 1):
        one = copy.deepcopy(layer)
        columns = layer.weight[0].numel()
        one.in_channels, one.out_channels, one.groups, one.bias = per_group, columns, 1, None
        one.weight = nn.Parameter(torch.eye(columns, dtype=x.dtype).view(columns, *layer.weight.shape[1:]))
        parts.append(one(part).movedim(1, -1).reshape(-1, columns))
    return torch.stack(parts).detach()


def best_fit(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer of this shape that come nearest to these outputs; y is rows x outputs."""
    rows = design(layer, x)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    wanted = y.view(len(y), len(rows), -1).transpose(0, 1)
    found = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.transpose(1, 2)
    columns = layer.weight[0].numel()
    bias = None if layer.bias is None else found[:, :, -1].flatten()
    return found[:, :, :columns].reshape(layer.weight.shape), bias


def by_row(layer: nn.Module, y: Tensor) -> Tensor:
    """Outputs as rows x channels."""
    return (y if isinstance(layer, nn.Linear) else y.movedim(1, -1)).reshape(-1, layer.weight.shape[0])


def read_and_returned(model: nn.Module, name: str, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer reads and returns, over all its calls; outputs by row."""
    read, returned = [], []

    def see(layer: Any, args: Any, result: Tensor) -> None:
        read.append(args[0])
        returned.append(by_row(layer, result))

    handle = model.get_submodule(name).register_forward_hook(see)
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return torch.cat(read), torch.cat(returned)


def error(model: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    """The distance of the outputs, relative."""
    with torch.no_grad():
        far = [(model.eval()(x) - other.eval()(x)).square().sum() for x in batches]
        return float(sum(far) / sum(other(x).square().sum() for x in batches)) ** 0.5


def pruned(model: nn.Module, x: Any, repair: Any, data: Any, **settings: Any) -> nn.Module:
    """A pruned copy."""
    model = copy.deepcopy(model)
    return fxslim.plan_pruning(model, x, repair=repair, data=data, **settings).apply(model)
