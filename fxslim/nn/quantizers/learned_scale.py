# SPDX-License-Identifier: Apache-2.0
"""A quantizer whose scale is learned: LSQ. The zero point is what calibration found."""

import torch
from torch import Tensor, nn

from fxslim.kernels import fake_quantize_learned
from fxslim.kernels.quantization_grid import grid_from_range
from fxslim.nn.quantizers.activations import ActivationQuantizer

_LEAST_SCALE = 1e-12


class LsqActivations(ActivationQuantizer):
    """``scale`` is a parameter."""

    def make_states(self) -> None:
        del self.scale
        self.scale = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        if self.config.fixed_min:
            low = torch.zeros_like(low)
        scale, zero_point = grid_from_range(low, high, *self.config.grid, self.symmetric)
        self.scale.copy_(scale)
        self.zero_point = torch.empty_like(self.zero_point).copy_(zero_point)

    def grid(self) -> tuple[Tensor, Tensor]:
        return positive(self.scale.detach()), self.zero_point

    def on_grid(self, x: Tensor) -> Tensor:
        return fake_quantize_learned(x, positive(self.scale), self.zero_point, *self.config.grid)


def positive(scale: Tensor) -> Tensor:
    """A learned scale that an optimizer pushed below 0 counts by its magnitude; at 0 it is tiny, and can grow."""
    magnitude = scale.abs()
    return torch.where(magnitude > _LEAST_SCALE, magnitude, scale - scale.detach() + _LEAST_SCALE)
