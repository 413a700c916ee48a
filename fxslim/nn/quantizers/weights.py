# SPDX-License-Identifier: Apache-2.0
"""What quantizes a weight: a module between the stored weight and what the layer computes with."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError, ConfigError
from fxslim.kernels import fake_quantize_learned
from fxslim.kernels.arguments import lies_channels_last, math_dtype
from fxslim.nn.quant_config import WeightQuant
from fxslim.nn.quantizers.gradient_routes import straight_through
from fxslim.nn.quantizers.learned_scale import positive
from fxslim.nn.quantizers.phases import PART, Phased, is_recomputed
from fxslim.patterns.weight_layout import WeightLayout


class WeightQuantizer(Phased):
    """Brings a weight to rows, one per scale, and back; subclasses quantize rows."""

    def __init__(self, config: WeightQuant, layout: WeightLayout, start_step: int = 0) -> None:
        super().__init__()
        self.config, self.layout, self.start_step = config, layout, start_step
        # While ranges of activations are chosen, the model computes in float.
        self.is_passing = False
        self._just_passed = False

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

    def forward(self, weight: Tensor, folded: Tensor | None = None, scales: list[Tensor] | None = None) -> Tensor:
        """The weight as it will be after quantization, straight through for gradients.

        ``folded``: what each output channel will be multiplied with before; the result is divided by it again.
        ``scales`` gets those of the result, where it is on a grid.
        """
        scale = self.folding_factor(folded, weight)
        given = weight if scale is None else weight * scale
        self.start_if_due(given)
        if not self._is_on():
            return weight
        self.look_at(given)
        if scales is None:
            result = self._by_rows(given, self.quantized)
        else:
            result, found = self.with_scales(given)
            scales.append(found if folded is None or scale is None else found / folded.abs())
        return result if scale is None else result / scale

    def with_scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight on its grid, and the scales, which carry no gradient."""
        return self._by_rows(weight, self.quantized), self.grid_of(weight)[0].detach()

    def folding_factor(self, folded: Tensor | None, weight: Tensor) -> Tensor | None:
        """What the weight is multiplied with before it is quantized, in its own layout; None: nothing need be."""
        return None if folded is None or self.minds_no_folding else self._along_outputs(folded, weight)

    @torch.no_grad()
    def values_and_scale(self, weight: Tensor, folded: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight times ``folded`` on its grid, as it is now, and the scales; None where steps are no integers."""
        scale = self.folding_factor(folded, weight)
        given = weight.detach() if scale is None else weight.detach() * scale
        self.start_if_due(given)
        self.look_at(given)
        values, scale = self.with_scales(given)
        return values, scale if self.config.format == "int" else None

    @property
    def minds_no_folding(self) -> bool:
        """Whether factors of output channels change no integer: one scale each, on a grid with two equal sides."""
        config = self.config
        return config.granularity != "tensor" and config.narrow and config.method in ("arq", "lsq")

    def _along_outputs(self, values: Tensor, weight: Tensor) -> Tensor:
        rows = values.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
        return self.layout.restored(rows.expand(self.layout.rows(weight).shape)) if self.layout.transposed else rows

    def start_if_due(self, weight: Tensor) -> None:
        """Where something is learned, it starts from the first weight that is seen."""

    def look_at(self, weight: Tensor) -> None:
        """Refuse what can't be quantized."""
        self.check_finite(weight)

    def _is_on(self) -> bool:
        seen, enabled, _ = self.read_phase()
        if not enabled or self.is_passing:
            return False
        if seen >= self.start_step:
            return not self._is_repeated()
        if self.training:
            self._count(seen)
        return False

    def _is_repeated(self) -> bool:
        """Whether gradient checkpointing repeats the last batch that passed unquantized: it does so again."""
        if torch.compiler.is_compiling() or not self._just_passed:
            return False
        self._just_passed = is_recomputed()
        return self._just_passed

    @torch.compiler.disable
    def _count(self, seen: int) -> None:
        if not is_recomputed():
            self.batches_seen = seen + 1
            self._just_passed = seen + 1 == self.start_step

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
        """On the CPU, where no device is waited for."""
        if values.device.type != "cpu" or torch.compiler.is_compiling() or _is_finite(values):
            return
        bad = int((~values.isfinite()).sum())
        if bad:
            raise CalibrationError(
                f"{self.described()}: {bad} of {values.numel()} entries of {tuple(values.shape)} are NaN or infinite, "
                "and can't be quantized: look at the last step of training"
            )

    def described(self) -> str:
        """The layer, as far as it is known here."""
        return getattr(self, "layer_name", None) or "a weight"

    def extra_repr(self) -> str:
        config = self.config
        kind = f"{config.bits} bit" if config.format == "int" else config.format
        size = f" of {config.group_size}" if config.granularity == "group" else ""
        return f"{kind}, per {config.granularity}{size}"


def _is_finite(values: Tensor) -> bool:
    """For certain: what is not shows in the sum."""
    return math.isfinite(values.detach().sum().item())


class ArqWeights(WeightQuantizer):
    """The scale of each forward covers the weight as it is: nothing is clipped, nothing is kept."""

    def look_at(self, weight: Tensor) -> None:
        """Its scales will tell."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        return self._checked(rows, axis)[0]

    def with_scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def look(rows: Tensor, axis: int | None) -> Tensor:
            y, scale = self._checked(rows, axis)
            found.append(scale)
            return y

        return self._by_rows(weight, look), found[0].detach()

    def _checked(self, rows: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        y, _, _, scale, _ = self._covered(rows, axis)
        if scale.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_finite(scale):
            self.check_finite(rows)
        return y, scale

    def _covered(self, rows: Tensor, axis: int | None) -> tuple[Tensor, ...]:
        # The operator itself: what its wrapper checks was checked with the config. Ranges from before are forgotten.
        before = rows.new_zeros(1 if axis is None else rows.shape[axis], dtype=math_dtype(rows))
        outputs = torch.ops.fxslim.observe_fake_quantize.default(
            rows, before, before, *self.config.grid, 1.0, True, axis, lies_channels_last(rows), False
        )
        return outputs[:5]

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
        self.register_buffer("is_started", torch.zeros((), dtype=torch.int64, device=weight.device))
        self._started = False

    def reset(self) -> None:
        self._started = False
        self.is_started.zero_()

    def reread(self) -> None:
        super().reread()
        started = self._buffers.get("is_started")
        if started is not None and not started.is_meta:
            self._started = bool(started > PART // 2)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Cover the weight as it is."""
        self.check_finite(weight)
        scale, _ = ArqWeights(self.config, self.layout).grid_of(weight)
        self.scale.copy_(scale)
        self.is_started.fill_(PART)
        self._started = True

    def start_if_due(self, weight: Tensor) -> None:
        if not self._started:
            self._start_once(weight)

    @torch.compiler.disable
    def _start_once(self, weight: Tensor) -> None:
        if weight.is_meta:
            return
        self.reread()
        if not self._started:
            self.start(weight)

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        return fake_quantize_learned(rows, positive(self.scale), 0, *self.config.grid, axis=axis)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not self._started:
            self._start_once(weight.detach())
        scale = positive(self.scale.detach())
        return scale, torch.zeros_like(scale, dtype=torch.int32)


class DorefaWeights(WeightQuantizer):
    """tanh brings the weight to [-1, 1], where it is rounded to ``2 ** bits`` equal steps. 0, of a mask, stays 0."""

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        squashed = rows.tanh()
        unit = squashed / (2 * squashed.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)) + 0.5
        steps = (1 << self.config.bits) - 1
        values = torch.round(unit * steps) / steps * 2 - 1
        return straight_through(torch.where(rows == 0, 0, values), 2 * unit - 1)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps = (1 << self.config.bits) - 1
        # Values are (2 * q - steps) / steps: a grid of odd numbers, twice as fine.
        return weight.new_full((1,), 1 / steps), torch.zeros(1, dtype=torch.int32, device=weight.device)


class BinaryWeights(WeightQuantizer):
    """The sign of each entry times the mean magnitude of its row; gradients pass where entries lie in [-1, 1].

    Zeros, of a mask, stay zeros and do not count in the mean.
    """

    def quantized(self, rows: Tensor, axis: int | None) -> Tensor:
        scale = self._scale(rows, axis)
        return straight_through(rows.sign() * scale, rows.clamp(-1, 1))

    def _scale(self, rows: Tensor, axis: int | None) -> Tensor:
        others = [d for d in range(rows.dim()) if d != axis]
        rows = rows.detach()
        total = rows.abs().sum(others, keepdim=True, dtype=math_dtype(rows))
        return (total / (rows != 0).sum(others, keepdim=True).clamp(min=1)).to(rows.dtype)

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def look(rows: Tensor, axis: int | None) -> Tensor:
            found.append(self._scale(rows, axis).reshape(-1))
            return rows

        self._by_rows(weight.detach(), look)
        return found[0], torch.zeros_like(found[0], dtype=torch.int32)
