# SPDX-License-Identifier: Apache-2.0
"""Which weights of a layer go, by what it reads, and how the others make up for them (optimal brain surgeon)."""

import math
from typing import Any

import torch
from torch import Tensor

from fxslim.errors import CalibrationError, ConfigError, FxslimError
from fxslim.patterns import NM, Block, Unstructured
from fxslim.sparsity.block_removal import remove_blocks
from fxslim.sparsity.column_order import order_columns
from fxslim.sparsity.column_updates import Columns
from fxslim.sparsity.damped_factor import factor_damped, scale_products
from fxslim.sparsity.entry_removal import remove_entries
from fxslim.sparsity.group_removal import remove_along_inputs, remove_along_outputs
from fxslim.sparsity.kept_weights import improve_kept

Patterns = NM | Block | Unstructured


def prune_by_hessian(
    weight: Tensor, gram: Tensor, pattern: Patterns, *, damping: float = 0.01, block_size: int = 128, sweeps: int = 0
) -> tuple[Tensor, Tensor]:
    """Mask and new weight of one group of a layer: (out, in, *kernel), outputs as near to the old ones as may be.

    ``gram`` holds the sums of products of what the layer reads, in the order of ``weight.flatten(1)``. It may be
    singular: ``damping`` times the mean of its diagonal is added, and ten times more until it can be factored.
    Weights of inputs that were always 0 cost nothing, and those that stay do not change. Others do where inputs are
    correlated:

    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> prune_by_hessian(torch.tensor([[3.0, 2.0]]), gram, NM(1, 2), damping=0.0)
    (tensor([[ True, False]]), tensor([[4., 0.]]))

    Columns are looked at one run after another, ``block_size`` of them between large products; blocks (``Block``) all
    at once. Columns make up only for those before them; each of the ``sweeps`` afterwards lets every kept weight make
    up for all others, which takes about as long again, and pays where there are many more samples than inputs.
    Computed in float32, in float64 for such weights.
    """
    _check(weight, gram, pattern, damping, block_size, sweeps)
    if not weight.numel():
        return torch.ones_like(weight, dtype=torch.bool), weight.detach().clone()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.detach().flatten(1).to(dtype)
    # Scaled before it is rounded: float64 sums may be too large for float32.
    products = scale_products(gram.detach()).to(dtype)
    rows = rows.masked_fill(gram.diagonal() <= 0, 0)
    with torch.autocast(weight.device.type, enabled=False):
        if isinstance(pattern, Block):
            rows, mask = remove_blocks(rows, products, damping, pattern, weight.shape)
        else:
            rows, mask = _removed_by_columns(rows, products, pattern, damping, weight.shape[1], block_size, sweeps)
    unseen = weight.detach().flatten(1).masked_fill(gram.diagonal() > 0, 0)
    new = (rows.to(weight.dtype) + unseen).masked_fill(~mask, 0)
    return mask.reshape(weight.shape).contiguous(), new.reshape(weight.shape).contiguous()


def _removed_by_columns(
    rows: Tensor,
    products: Tensor,
    pattern: NM | Unstructured,
    damping: float,
    channels: int,
    block_size: int,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """New rows and their mask."""
    order, runs = order_columns(products.diagonal(), channels, pattern)
    # The other way round a lower factor is an upper one.
    backwards = order.flip(0)
    damped, lower = factor_damped(products.index_select(0, backwards).index_select(1, backwards), damping)
    factor = lower.flip(0, 1)
    old = rows.t().index_select(0, order)
    columns = Columns(old, factor)
    if isinstance(pattern, Unstructured):
        mask = remove_entries(columns, runs, pattern, block_size)
    elif pattern.axis == 0:
        mask = remove_along_outputs(columns, runs, pattern, block_size)
    else:
        mask = remove_along_inputs(columns, factor, runs, pattern, block_size)
    new = columns.values
    if sweeps:
        damped = damped.flip(0, 1)
        for _ in range(sweeps):
            new = improve_kept(new, old, mask, damped, block_size)
    back = order.argsort()
    return new.index_select(0, back).t(), mask.index_select(0, back).t()


def _check(weight: Tensor, gram: Tensor, pattern: Any, damping: Any, block_size: Any, sweeps: Any) -> None:
    if not isinstance(pattern, NM | Block | Unstructured):
        raise ConfigError(f"pattern must be NM, Block or Unstructured, got {pattern!r}")
    if pattern.removed() is None:
        raise ConfigError(f"{pattern} has no ratio: give one, as in .at(0.5)")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise ConfigError(f"damping={damping!r} must be a number >= 0: a fraction of the mean of gram's diagonal")
    for name, value, least in (("block_size", block_size, 1), ("sweeps", sweeps, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be an integer >= {least}")
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ConfigError(f"weight must be (out, in, *kernel) of floats, got {tuple(weight.shape)} of {weight.dtype}")
    size = weight.shape[1:].numel()
    if gram.shape != (size, size) or gram.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"a weight of shape {tuple(weight.shape)} reads {size} values: gram must be {size} x {size} of float32 or "
            f"float64, got {tuple(gram.shape)} of {gram.dtype}"
        )
    _check_finite("weight", weight, ConfigError, "mend the model first")
    _check_finite("gram", gram, CalibrationError, "look for NaN in the calibration data, or for overflow in its sums")


def _check_finite(name: str, values: Tensor, error: type[FxslimError], advice: str) -> None:
    # The smallest and the largest tell in one pass.
    if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all():
        num_odd = int((~values.isfinite()).sum())
        raise error(f"{num_odd} of {values.numel()} entries of {name} are NaN or infinite: {advice}")
