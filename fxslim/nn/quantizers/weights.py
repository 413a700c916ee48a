# SPDX-License-Identifier: Apache-2.0
"""What quantizes a weight: a module between the stored weight and what the layer computes with."""

from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError, ConfigError
from fxslim.kernels import fake_quantize_learned, observe_fake_quantize
from fxslim.nn.quant_config import WeightQuant
from fxslim.nn.quantizers.phases import Phased, is_recomputed
from fxslim.patterns.weight_layout import WeightLayout


class WeightQuantizer(Phased):
    """Brings a weight to rows, one per scale, and back; subclasses quantize rows."""

    def __init__(self, config: WeightQuant, layout: WeightLayout, start_step: int = 0) -> None:
        super().__init__()
        self.config, self.layout, self.start_step = config, layout, start_step

    def scale_shape(self, weight: Tensor) -> tuple[int, ...]:
        """How many scales the weight has: one, one per output, or outputs x groups."""
        if self.config.granularity == "tensor":
            return (1,)
        rows = self.layout.rows(weight)
        if self.config.granularity == "channel":
            return (rows.shape[0],)
        size = self.config.group_size
        assert size is not None
        if rows.shape[1] % size:
            raise ConfigError(
                f"weight.group_size={size} does not divide the {rows.shape[1]} inputs of a weight of shape "
                f"{tuple(weight.shape)}: take one that does, or granularity 'channel'"
            )
        return (rows.shape[0] * (rows.shape[1] // size),)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it will be after quantization, straight through for gradients."""
        if not self._is_on():
            return weight
        return self._by_rows(weight, self.quantized)

    def _is_on(self) -> bool:
        seen, enabled, _ = self.read_phase()
        if not enabled:
            return False
        if seen >= self.start_step:
            return True
        if self.training and not torch.compiler.is_compiling() and not is_recomputed():
            self.batches_seen = seen + 1
        return False

    def _by_rows(self, weight: Tensor, change: Any) -> Tensor:
        """``change(rows, axis)``, where each entry of the axis has a scale of its own."""
        if self.config.granularity == "tensor":
            return change(weight, None)
        layout = self.layout
        if self.config.granularity == "channel":
            if layout.transposed and layout.groups == 1:
                return change(weight, 1)
            return layout.restored(change(layout.rows(weight), 0)) if layout.transposed else change(weight, 0)
        rows, size = layout.rows(weight), self.config.group_size
        assert size is not None
        self.scale_shape(weight)
        groups = rows.unflatten(1, (-1, size)).flatten(0, 1)
        result = change(groups, 0).unflatten(0, (rows.shape[0], -1)).flatten(1, 2)
        return layout.restored(result)

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        """Rows after quantization; ``axis`` None for one scale."""
        raise NotImplementedError

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of a weight, as vectors."""
        raise NotImplementedError

    def attach(self, weight: Tensor) -> None:
        """Make the states that depend on the weight's shape."""
        self.scale_shape(weight)

    def check_finite(self, values: Tensor) -> None:
        """On the CPU, where looking is free: NaN in a weight shows in its scale."""
        if values.device.type == "cpu" and not torch.compiler.is_compiling() and not values.isfinite().all():
            raise CalibrationError(f"a weight has NaN or infinity: {self.described()} can't be quantized")

    def described(self) -> str:
        """The layer, as far as it is known here."""
        return getattr(self, "layer_name", None) or "the layer"

    def extra_repr(self) -> str:
        config = self.config
        kind = f"{config.bits} bit" if config.format == "int" else config.format
        size = f" of {config.group_size}" if config.granularity == "group" else ""
        return f"{kind}, per {config.granularity}{size}"


class ArqWeights(WeightQuantizer):
    """The scale of each forward covers the weight as it is: nothing is clipped, nothing is kept."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        y, _, _, scale, _ = self._covered(rows, axis)
        self.check_finite(scale)
        return y

    def _covered(self, rows: Tensor, axis: int | None) -> tuple[Tensor, ...]:
        # Ranges from before are forgotten, so any will do.
        return observe_fake_quantize(rows, 0.0, 0.0, *self.config.grid, averaging=1.0, symmetric=True, axis=axis)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def look(rows: Tensor, axis: int | None) -> Tensor:
            found.extend(self._covered(rows, axis)[3:])
            return rows

        self._by_rows(weight.detach(), look)
        return found[0], found[1]


class LsqWeights(WeightQuantizer):
    """The scale is a parameter; it starts where it covers the weight."""

    scale: nn.Parameter
    is_started: Tensor

    def attach(self, weight: Tensor) -> None:
        super().attach(weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.scale = nn.Parameter(torch.ones(self.scale_shape(weight), dtype=dtype, device=weight.device))
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool, device=weight.device))
        self._started = False

    def reset(self) -> None:
        self._started = False
        self.is_started.zero_()

    def reread(self) -> None:
        super().reread()
        started = self._buffers.get("is_started")
        if started is not None and not started.is_meta:
            self._started = bool(started)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Cover the weight as it is."""
        scale, _ = ArqWeights(self.config, self.layout).grid_of(weight)
        self.check_finite(scale)
        self.scale.copy_(scale)
        self.is_started.fill_(True)
        self._started = True

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self._started and not weight.is_meta:
            self.reread()
            if not self._started:
                self.start(weight)
        return super().forward(weight)

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        # A step of the optimizer may take a small scale past 0.
        return fake_quantize_learned(rows, self.scale.abs(), 0, *self.config.grid, axis=axis)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale.detach().abs()
        return scale, torch.zeros_like(scale, dtype=torch.int32)


class DorefaWeights(WeightQuantizer):
    """tanh brings the weight to [-1, 1], where it is rounded to ``2 ** bits`` equal steps."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        squashed = rows.tanh()
        unit = squashed / (2 * squashed.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)) + 0.5
        steps = (1 << self.config.bits) - 1
        rounded = unit + (torch.round(unit * steps) / steps - unit).detach()
        return 2 * rounded - 1

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps = (1 << self.config.bits) - 1
        # Values are (2 * q - steps) / steps: a grid of odd numbers, twice as fine.
        return weight.new_full((1,), 1 / steps), torch.zeros(1, dtype=torch.int32, device=weight.device)


class BinaryWeights(WeightQuantizer):
    """The sign of each entry times the mean magnitude of its row; gradients pass where entries lie in [-1, 1]."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        scale = self._scale(rows, axis)
        signs = torch.where(rows >= 0, scale, -scale)
        inside = rows.clamp(-1, 1)
        return inside + (signs - inside).detach()

    def _scale(self, rows: Tensor, axis: int | None) -> Tensor:
        others = [d for d in range(rows.dim()) if d != axis]
        return rows.detach().abs().mean(others, keepdim=True)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def look(rows: Tensor, axis: int | None) -> Tensor:
            found.append(self._scale(rows, axis).reshape(-1))
            return rows

        self._by_rows(weight.detach(), look)
        return found[0], torch.zeros_like(found[0], dtype=torch.int32)


_BY_METHOD: dict[str, type[WeightQuantizer]] = {
    "arq": ArqWeights, "lsq": LsqWeights, "dorefa": DorefaWeights, "binary": BinaryWeights,
}  # fmt: skip


def weight_quantizer(config: WeightQuant, layout: WeightLayout, weight: Tensor, start_step: int = 0) -> WeightQuantizer:
    """The quantizer that a config asks for, ready for this weight."""
    made = _BY_METHOD[config.method](config, layout, start_step)
    made.to(weight.device)
    made.attach(weight)
    made.reread()
    return made
