# SPDX-License-Identifier: Apache-2.0
"""Quantizers of activations that learn and watch nothing any more: for deployment and export."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError
from fxslim.kernels import fake_quantize, fake_quantize_float
from fxslim.nn.quantizers.onnx_lowering import is_lowering, lowered_activation

if TYPE_CHECKING:
    from fxslim.nn.quantizers.activations import ActivationQuantizer


class FixedQuantizer(nn.Module):
    """An activation on the grid of ``scale`` and ``zero_point``, two numbers; ``levels`` are the ends of its integers.

    >>> FixedQuantizer(torch.tensor(0.5), torch.tensor(3), (0, 7))(torch.tensor([-9.0, 0.2, 0.3, 9.0]))
    tensor([-1.5000,  0.0000,  0.5000,  2.0000])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, levels: tuple[int, int], format: str = "int") -> None:
        super().__init__()
        self.levels, self.format = levels, format
        self.register_buffer("scale", scale.detach().reshape(()).float().clone())
        self.register_buffer("zero_point", zero_point.detach().reshape(()).to(torch.int32).clone())

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        if not x.is_floating_point():
            return x
        if is_lowering():
            return lowered_activation(x, self.scale, self.zero_point, self.levels, self.format)
        if self.format != "int":
            return fake_quantize_float(x, self.scale, self.format)
        return fake_quantize(x, self.scale, self.zero_point, *self.levels)

    def unneeded(self, x: Tensor, done: Tensor) -> Tensor:
        """``done``, which another quantizer made of x."""
        return done

    def extra_repr(self) -> str:
        kind = self.format if self.format != "int" else f"{self.levels[0]} to {self.levels[1]}"
        return kind if self.scale.is_meta else f"{kind}, scale {self.scale.item():.4g}, zero point {self.zero_point}"


def fixed_quantizer(quantizer: "ActivationQuantizer") -> FixedQuantizer:
    """With the grid that is in force now."""
    check_calibrated(quantizer)
    config = quantizer.config
    with torch.no_grad():
        return FixedQuantizer(*quantizer.grid(), config.grid, config.format)


def check_calibrated(quantizer: "ActivationQuantizer") -> None:
    """Raise where there is no range yet."""
    if not quantizer.is_calibrated:
        seen, needed = quantizer.batches_seen, quantizer.batches_needed
        raise CalibrationError(
            f"{quantizer.described()} has no range yet: it has seen {seen} of {needed} training batches; train on, or "
            "run fxslim.quantize(model, data=...) or forwards within fxslim.calibrating(model)"
        )
