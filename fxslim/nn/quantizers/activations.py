# SPDX-License-Identifier: Apache-2.0
"""What quantizes an activation: first it may watch some batches unquantized, then it puts values on a grid."""

from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError
from fxslim.nn.quant_config import ActivationQuant
from fxslim.nn.quantizers.phases import Phased, is_recomputed
from fxslim.nn.quantizers.rank_average import average_over_ranks, num_ranks
from fxslim.ranges import range_method


class _Untouched(torch.autograd.Function):
    """The same values; parameters that are not used yet get gradients of 0, which data-parallel training waits for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in unused]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


class ActivationQuantizer(Phased):
    """The states that all have: the grid in force, and what calibration saw. Subclasses turn a range into a grid.

    ``scale`` and ``zero_point`` are those of the last forward.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, config: ActivationQuant, start_step: int = 0) -> None:
        super().__init__()
        self.config, self.start_step = config, start_step
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.make_states()
        self._collecting = self._just_calibrated = False
        self._method: Any = None
        self.batches_collected = 0
        if config.clip_min is not None and config.clip_max is not None:
            self.set_range(torch.tensor(float(config.clip_min)), torch.tensor(float(config.clip_max)))
            self.batches_needed = start_step
        else:
            self.batches_needed = start_step + config.batch_num
            for name, value in self._new_method().state().items():
                self.register_buffer("calibration_" + name, value)

    def make_states(self) -> None:
        """Parameters and buffers of a subclass."""

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take this range, with 0 inside, as the grid's."""
        raise NotImplementedError

    def on_grid(self, x: Tensor) -> Tensor:
        """x on the grid."""
        raise NotImplementedError

    @property
    def symmetric(self) -> bool:
        """Whether 0 is in the middle of the grid."""
        return bool(self.config.symmetric)

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a range."""
        return self.read_phase()[0] >= self.batches_needed

    def forward(self, x: Tensor) -> Tensor:
        """x as it will be after quantization; unchanged before there is a range, and where it is switched off."""
        seen, enabled, observing = self.read_phase()
        if self._collecting and observing:
            self._observe(x)
            self.batches_collected += 1
            return x
        if not enabled or not x.is_floating_point():
            return x
        if torch.compiler.is_compiling():
            if seen >= self.batches_needed:
                return self.on_grid(x)
            return self._calibrated_outside(x, seen) if self.training and observing else x
        again = is_recomputed()
        # The last batch of a calibration passes unquantized when gradient checkpointing repeats it, too.
        if seen >= self.batches_needed and not (again and self._just_calibrated):
            self._just_calibrated = False
            return self.on_grid(x)
        if self.training and observing and not again:
            self._calibrate(x, seen)
        return self._passed(x)

    def _passed(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and num_ranks() > 1) or torch.compiler.is_compiling():
            return x
        waiting = [p for p in self.parameters() if p.requires_grad]
        return _Untouched.apply(x, *waiting) if waiting else x

    @torch.compiler.disable
    def _calibrated_outside(self, x: Tensor, seen: int) -> Tensor:
        """Choosing a range is no part of a compiled graph; afterwards that is compiled anew."""
        if not is_recomputed():
            self._calibrate(x, seen)
        return x

    def unneeded(self, x: Tensor, done: Tensor) -> Tensor:
        """``done``, which another quantizer made of x; x is only watched, where there is no range yet."""
        seen, _, observing = self.read_phase()
        if self._collecting and observing:
            self._observe(x)
            self.batches_collected += 1
        elif self.training and observing and seen < self.batches_needed and not self._is_repeated():
            self._calibrate(x, seen)
            self._just_calibrated = False
        return self._passed(done)

    def _is_repeated(self) -> bool:
        """Compiled code counts no batches either."""
        return torch.compiler.is_compiling() or is_recomputed()

    def _calibrate(self, x: Tensor, seen: int) -> None:
        """A training batch before there is a range."""
        if seen >= self.start_step:
            self._observe(x)
        if seen + 1 == self.batches_needed:
            self.finish_calibration()
            self._just_calibrated = True
        else:
            self.batches_seen = seen + 1

    def _new_method(self) -> Any:
        options: dict[str, Any] = {}
        if self.config.calibration == "moving_average":
            options["averaging"] = self.config.averaging
        return range_method(self.config.calibration, **options)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        method = self._new_method()
        method.load_state({name: self._buffers["calibration_" + name] for name in method.state()})
        try:
            method.observe(x.detach())
        except CalibrationError as error:
            raise CalibrationError(f"{self.described()}: {error}") from error
        for name, value in method.state().items():
            setattr(self, "calibration_" + name, value)
        self._method = method

    def start_collecting(self) -> None:
        """Watch forwards in any mode, unquantized, until ``finish_calibration``; what was seen before is forgotten."""
        for name, value in self._new_method().state().items():
            self.register_buffer("calibration_" + name, value.to(self.scale.device))
        self._method, self._collecting, self.batches_collected = None, True, 0

    def stop_collecting(self) -> None:
        """Watch no more; the range stays what it was."""
        self._collecting, self._method = False, None

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Choose the range from what was seen, the same on all ranks."""
        self._collecting = False
        if self._method is None:
            raise CalibrationError(f"{self.described()} saw no data: run forwards that reach it, or leave it in float")
        low, high = self._method.range(*self.config.grid, symmetric=self.symmetric)
        low, high = average_over_ranks(low.float(), high.float())
        self.set_range(low.clamp(max=0), high.clamp(min=0))
        self.batches_seen, self._method = self.batches_needed, None

    def described(self) -> str:
        """Where it is, as far as it is known here."""
        return getattr(self, "layer_name", None) or "an activation"

    def keep_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Remember the grid of this forward."""
        self.scale, self.zero_point = scale.detach(), zero_point.detach()

    def extra_repr(self) -> str:
        config = self.config
        kind = f"{config.bits} bit" if config.format == "int" else config.format
        return f"{kind}, {config.method}{', symmetric' if self.symmetric else ''}"


def each_activation_quantizer(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
