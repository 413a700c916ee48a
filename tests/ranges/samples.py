# SPDX-License-Identifier: Apache-2.0
"""Data of many shapes that ranges are chosen for, and the error that a range makes on it."""

import torch
from torch import Tensor

from fxslim.kernels import fake_quantize
from fxslim.kernels.quantization_grid import grid_from_range

_RANDOM = torch.Generator().manual_seed(0)
_NORMAL = torch.randn(20_000, generator=_RANDOM)
SAMPLES: dict[str, Tensor] = {
    "normal": _NORMAL,
    "relu": _NORMAL.relu(),
    "outlier": torch.cat([_NORMAL, torch.tensor([60.0])]),
    "uniform": torch.rand(20_000, generator=_RANDOM) * 3 - 1,
    "heavy tail": _NORMAL.abs().pow(4) * _NORMAL.sign(),
    "constant": torch.full((500,), 3.0),
    "below 0": -torch.rand(20_000, generator=_RANDOM) - 0.5,
    "far from 0": _NORMAL * 1e-3 + 700.0,
}


def true_error(x: Tensor, clips: tuple[Tensor, Tensor], quant_min: int, quant_max: int, symmetric: bool) -> float:
    """The mean squared error of quantizing the data itself."""
    scale, zero_point = grid_from_range(*(end.reshape(1) for end in clips), quant_min, quant_max, symmetric)
    return (fake_quantize(x, scale, zero_point, quant_min, quant_max) - x).double().square().mean().item()
