# SPDX-License-Identifier: Apache-2.0
"""Quantizers to small floating-point formats: one scale brings the largest magnitude to the format's largest value."""

import torch
from torch import Tensor

from fxslim.kernels import fake_quantize_float, observe_min_max
from fxslim.kernels.arguments import math_dtype
from fxslim.kernels.float_fake_quantization import FORMATS
from fxslim.nn.quantizers.observed import MinMaxActivations, StaticActivations
from fxslim.nn.quantizers.weights import WeightQuantizer


def _scale_of(low: Tensor, high: Tensor, format: str) -> Tensor:
    """Scales at which both ends fit; 1 where there is nothing but 0."""
    most = torch.maximum(high, -low)
    return torch.where(most == 0, torch.ones_like(most), most / FORMATS[format].largest)


class FloatGridWeights(WeightQuantizer):
    """The scale of each forward brings the largest magnitude of a row to the format's largest value."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        return fake_quantize_float(rows, self._scale(rows, axis), self.config.format, axis)

    def _scale(self, rows: Tensor, axis: int | None) -> Tensor:
        low, high = observe_min_max(rows, axis)
        return _scale_of(low.reshape(-1), high.reshape(-1), self.config.format)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def look(rows: Tensor, axis: int | None) -> Tensor:
            found.append(self._scale(rows, axis))
            return rows

        self._by_rows(weight.detach(), look)
        return found[0], torch.zeros_like(found[0], dtype=torch.int32)


class StaticFloatGrid(StaticActivations):
    """The scale is what calibration found, and stays."""

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        self.scale = torch.empty_like(self.scale).copy_(_scale_of(low, high, self.config.format))

    def on_grid(self, x: Tensor) -> Tensor:
        return fake_quantize_float(x, self.scale, self.config.format)


class MinMaxFloatGrid(MinMaxActivations, StaticFloatGrid):
    """The scale follows moving averages of the extrema in training."""

    def observed(self, x: Tensor) -> tuple[Tensor, ...]:
        now, rate = observe_min_max(x), self.config.averaging
        before = self.range_min.to(math_dtype(x)), self.range_max.to(math_dtype(x))
        low, high = (
            torch.where(old.isinf(), new.reshape(1), old + (new.reshape(1) - old) * rate)
            for old, new in zip(before, now, strict=True)
        )
        scale = self.grid_over(low, high)[0]
        return fake_quantize_float(x, scale, self.config.format), low, high, scale, self.zero_point

    def grid_over(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return _scale_of(low, high, self.config.format), self.zero_point
