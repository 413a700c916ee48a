# SPDX-License-Identifier: Apache-2.0
"""Quantizers whose clips are learned: ULQ, LSQ+ and PACT."""

import torch
from torch import Tensor, nn

from fxslim.kernels import fake_quantize, fake_quantize_clipped
from fxslim.kernels.arguments import lies_channels_last, math_dtype
from fxslim.nn.quantizers.activations import ActivationQuantizer
from fxslim.nn.quantizers.gradient_routes import straight_through, with_scaled_gradient
from fxslim.nn.quantizers.phases import set_buffers

# Below this a range is nothing: the epsilon of float32.
_LEAST_RANGE = 1.192092896e-07


class UlqActivations(ActivationQuantizer):
    """Both clips are parameters. Where they are no range (any more), the last ones that were stand in for them."""

    clip_min: nn.Parameter
    clip_max: nn.Parameter
    last_min: Tensor
    last_max: Tensor

    def make_states(self) -> None:
        if not (self.config.fixed_min or self.symmetric):
            self.clip_min = nn.Parameter(torch.full((1,), -1.0))
        self.clip_max = nn.Parameter(torch.ones(1))
        self.register_buffer("last_min", torch.full((1,), 0.0 if self.config.fixed_min else -1.0))
        self.register_buffer("last_max", torch.ones(1))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        if self.symmetric:
            least, most = self.config.grid
            high = torch.maximum(high / most, low / least) * most
            low = high * (least / most)
        if self.config.fixed_min:
            low = torch.zeros_like(low)
        high = torch.where(high - low > _LEAST_RANGE, high, low + 1.0)
        self.last_min, self.last_max = (
            torch.empty_like(self.last_min).copy_(low),
            torch.empty_like(self.last_max).copy_(high),
        )
        self.clip_max.copy_(high)
        if "clip_min" in self._parameters:
            self.clip_min.copy_(low)

    def clips(self) -> tuple[Tensor, Tensor]:
        """The clips in force."""
        low, high = self._plain_clips() if self._are_plainly_valid() else self._valid_clips()
        if self.training:
            set_buffers(self, last_min=low.clone(), last_max=high.clone())
        return low, high

    def _are_plainly_valid(self) -> bool:
        """Where looking is free, nothing need be computed for clips that are a range."""
        if self.clip_max.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        low = self.clip_min.item() if "clip_min" in self._parameters else 0.0
        high = self.clip_max.item()
        return low <= 0 <= high and high - low > _LEAST_RANGE

    def _plain_clips(self) -> tuple[Tensor, Tensor]:
        high: Tensor = self.clip_max
        if self.symmetric:
            least, most = self.config.grid
            return high * (least / most), high
        return torch.zeros_like(high) if self.config.fixed_min else self.clip_min, high

    def _valid_clips(self) -> tuple[Tensor, Tensor]:
        low, high = self._plain_clips()
        if self.symmetric or self.config.fixed_min:
            high = _valid(high, high > _LEAST_RANGE, self.last_max)
            low = high * (self.config.grid[0] / self.config.grid[1]) if self.symmetric else low
        else:
            some = (high - low).detach() > _LEAST_RANGE
            low, high = _valid(low, some & (low <= 0), self.last_min), _valid(high, some & (high >= 0), self.last_max)
        return low, high

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        low, high = self._valid_clips()
        return fake_quantize_clipped(torch.zeros_like(high), low, high, *self.config.grid)[1:]

    def on_grid(self, x: Tensor) -> Tensor:
        low, high = (clip.to(math_dtype(x)) for clip in self.clips())
        # The operator itself: what its wrapper checks holds of clips that are valid.
        y, scale, zero_point = torch.ops.fxslim.fake_quantize_clipped.default(
            x, low, high, *self.config.grid, lies_channels_last(x)
        )
        self.keep_grid(scale, zero_point)
        return y


class LsqPlusActivations(UlqActivations):
    """As ULQ, with gradients of the clips divided by ``sqrt(elements * largest integer)``, as LSQ does."""

    def on_grid(self, x: Tensor) -> Tensor:
        low, high = self.clips()
        least, most = self.config.grid
        factor = (max(x.numel(), 1) * max(abs(most), 1)) ** -0.5
        y, scale, zero_point = fake_quantize_clipped(
            x, with_scaled_gradient(low, factor), with_scaled_gradient(high, factor), least, most
        )
        self.keep_grid(scale, zero_point)
        return y


class PactActivations(UlqActivations):
    """The upper clip is learned from what it cuts off, rounding aside; what is below 0 becomes 0."""

    def make_states(self) -> None:
        self.clip_max = nn.Parameter(torch.ones(1))
        self.register_buffer("last_min", torch.zeros(1))
        self.register_buffer("last_max", torch.ones(1))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        super().set_range(torch.zeros_like(low), high)

    def clips(self) -> tuple[Tensor, Tensor]:
        high = self._valid_high()
        if self.training:
            set_buffers(self, last_max=high.clone())
        return torch.zeros_like(high), high

    def _valid_high(self) -> Tensor:
        return _valid(self.clip_max, self.clip_max > _LEAST_RANGE, self.last_max)

    @property
    def _zero(self) -> int:
        return 0 if self.symmetric else self.config.grid[0]

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        return self._valid_high() / (self.config.grid[1] - self._zero), torch.full_like(self.zero_point, self._zero)

    def on_grid(self, x: Tensor) -> Tensor:
        high = self.clips()[1].to(math_dtype(x))
        least, most = self.config.grid
        zero_point = self._zero
        scale = high.detach() / (most - zero_point)
        self.keep_grid(scale, torch.full_like(self.zero_point, zero_point))
        rounded = fake_quantize(x.detach().relu(), scale, zero_point, least, most)
        # In the precision of the clip: an end that is rounded to half precision may lie past the grid.
        end = high.reshape(()).expand(x.shape)
        through = torch.where(x.to(high.dtype) >= end, end, x.to(high.dtype).relu())
        return straight_through(rounded, through.to(x.dtype))


def _valid(value: Tensor, good: Tensor, last: Tensor) -> Tensor:
    """The value where it is good, else the last that was; gradients go on in both cases."""
    return torch.where(good, value, last + (value - value.detach()))
