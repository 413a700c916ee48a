# SPDX-License-Identifier: Apache-2.0
"""Quantizers whose range is observed: moving extrema in training, or what calibration found."""

import math

import torch
from torch import Tensor

from fxslim.errors import CalibrationError
from fxslim.kernels import fake_quantize
from fxslim.kernels.arguments import lies_channels_last, math_dtype
from fxslim.kernels.observed_fake_quantization import never_clips
from fxslim.kernels.quantization_grid import grid_from_range
from fxslim.nn.quantizers.activations import ActivationQuantizer
from fxslim.nn.quantizers.onnx_lowering import is_lowering
from fxslim.nn.quantizers.phases import is_recomputed, set_buffers
from fxslim.nn.quantizers.rank_average import average_over_ranks


class StaticActivations(ActivationQuantizer):
    """The grid is what calibration found, and stays."""

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        if self.config.fixed_min:
            low = torch.zeros_like(low)
        scale, zero_point = grid_from_range(low, high, *self.config.grid, self.symmetric)
        self.scale = torch.empty_like(self.scale).copy_(scale)
        self.zero_point = torch.empty_like(self.zero_point).copy_(zero_point)

    def on_grid(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, *self.config.grid)


class MinMaxActivations(StaticActivations):
    """The range follows moving averages of the extrema in training; frozen, or in eval mode, it stays."""

    range_min: Tensor
    range_max: Tensor

    def make_states(self) -> None:
        self.register_buffer("range_min", torch.full((1,), torch.inf))
        self.register_buffer("range_max", torch.full((1,), -torch.inf))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        super().set_range(low, high)
        self.range_min = torch.empty_like(self.range_min).copy_(low)
        self.range_max = torch.empty_like(self.range_max).copy_(high)

    def forward(self, x: Tensor) -> Tensor:
        seen, enabled, observing = self.read_phase()
        if self._collecting or not enabled or not x.is_floating_point() or is_lowering():
            return super().forward(x)
        if not (self.training and observing and seen >= self.start_step) or is_recomputed():
            return super().forward(x)
        self._just_passed = False
        y = self._followed(x)
        if seen < self.batches_needed:
            self.batches_seen = self.batches_needed
        return y

    def observed(self, x: Tensor) -> tuple[Tensor, ...]:
        """x on the grid of the new range, that range, and the grid."""
        # The operator itself: what its wrapper checks was checked with the config.
        config, dtype = self.config, math_dtype(x)
        low, high = self.range_min.to(dtype), self.range_max.to(dtype)
        save_mask = torch.is_grad_enabled() and x.requires_grad and not never_clips(config.averaging, self.symmetric)
        outputs = torch.ops.fxslim.observe_fake_quantize.default(
            x, low, high, *config.grid, config.averaging, self.symmetric, None, lies_channels_last(x), save_mask
        )
        return outputs[:5]

    def grid_over(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range."""
        return grid_from_range(low, high, *self.config.grid, self.symmetric)

    def _followed(self, x: Tensor) -> Tensor:
        config = self.config
        y, low, high, scale, zero_point = self.observed(x)
        if config.fixed_min and (x.device.type != "cpu" or torch.compiler.is_compiling() or low.item() < 0):
            y, low, high, scale, zero_point = self.observed(x.clamp(min=0))
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(scale.item()):
            bad = int((~x.isfinite()).sum())
            raise CalibrationError(f"{self.described()}: {bad} of {x.numel()} entries of a batch are NaN or infinite")
        shared_low, shared_high = average_over_ranks(low, high)
        if shared_low is not low:
            scale, zero_point = self.grid_over(shared_low, shared_high)
        set_buffers(self, range_min=shared_low, range_max=shared_high)
        self.keep_grid(scale, zero_point)
        return y
