# SPDX-License-Identifier: Apache-2.0
"""What quantizes an activation: first it may watch some batches unquantized, then it puts values on a grid."""

from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError
from fxslim.nn.quant_config import ActivationQuant
from fxslim.nn.quantizers.fixed_quantizers import fixed_quantizer
from fxslim.nn.quantizers.integer_sums import Channels, as_integer_kernels, joined_sums
from fxslim.nn.quantizers.onnx_lowering import check_format, is_lowering, telling
from fxslim.nn.quantizers.phases import Phased, is_recomputed, set_buffers
from fxslim.nn.quantizers.rank_average import average_over_ranks, num_ranks
from fxslim.nn.quantizers.real_values import real_twin, without_modes
from fxslim.ranges import range_method

# Of what integer kernels give.
_KERNEL_BITS = 8


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
    # What layers say of the sums that come next: where they are, and their steps.
    _sums: dict[Channels, Tensor]

    def __init__(self, config: ActivationQuant, start_step: int = 0) -> None:
        super().__init__()
        self.config, self.start_step = config, start_step
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.make_states()
        self._collecting = self._just_passed = False
        self._method: Any = None
        self.forget_sums()
        self.batches_collected = 0
        if config.clip_min is not None and config.clip_max is not None:
            self.set_range(torch.tensor(float(config.clip_min)), torch.tensor(float(config.clip_max)))
            self.batches_needed = start_step
        else:
            self.batches_needed = start_step + config.batch_num
        if self._calibrates:
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

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they would be now, in eval mode."""
        return self.scale.detach(), self.zero_point

    @property
    def symmetric(self) -> bool:
        """Whether 0 is in the middle of the grid."""
        return bool(self.config.symmetric)

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a range."""
        return self.read_phase()[0] >= self.batches_needed

    @property
    def is_quantizing(self) -> bool:
        """Whether what it gives in eval mode is on a grid."""
        seen, enabled, observing = self.read_phase()
        return bool(enabled) and seen >= self.batches_needed and not (self._collecting and observing)

    def forward(self, x: Tensor) -> Tensor:
        """x as it will be after quantization; unchanged before there is a range, and where it is switched off."""
        seen, enabled, observing = self.read_phase()
        if is_lowering():
            return self._lowered(x) if enabled else x
        if self._collecting and observing:
            self._observe(x)
            self.batches_collected += 1
            return x
        if not enabled or not x.is_floating_point():
            return x
        if seen >= self.batches_needed and not self._is_repeated():
            return self.on_grid(self._taken_as_sums(x))
        if self.training and observing and not x.is_meta:
            self._calibrate(x, seen)
        return self._passed(x)

    def expect_sums(self, step: Tensor, channels: Channels) -> None:
        """What comes next in eval mode is a layer's integer sums there, whole numbers of ``step``."""
        self._sums = self._sums | {channels: step}

    def forget_sums(self) -> None:
        """What comes next is any tensor."""
        self._sums = {}

    def _taken_as_sums(self, x: Tensor) -> Tensor:
        # Read once: another thread may forget them.
        sums = self._sums
        if not sums:
            return x
        self.forget_sums()
        config = self.config
        if self.training or config.format != "int" or config.bits > _KERNEL_BITS:
            return x
        for channels, step in joined_sums(sums, x.shape).items():
            x = as_integer_kernels(x, step, channels, self.grid()[0])
        return x

    def _lowered(self, x: Tensor) -> Tensor:
        with without_modes(), telling():
            check_format(self.config.format, self.described())
            fixed = fixed_quantizer(real_twin(self))
        return fixed(x)

    def _is_repeated(self) -> bool:
        """Whether gradient checkpointing repeats the last batch that passed unquantized: it does so again."""
        if torch.compiler.is_compiling() or not self._just_passed:
            return False
        self._just_passed = is_recomputed()
        return self._just_passed

    def _passed(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and num_ranks() > 1) or torch.compiler.is_compiling():
            return x
        waiting = [p for p in self.parameters() if p.requires_grad]
        return _Untouched.apply(x, *waiting) if waiting else x

    def unneeded(self, x: Tensor, done: Tensor) -> Tensor:
        """``done``, which another quantizer made of x; x is only watched, where there is no range yet."""
        seen, _, observing = self.read_phase()
        if self._collecting and observing:
            self._observe(x)
            self.batches_collected += 1
        elif self.training and observing and seen < self.batches_needed:
            self._watch(x)
        return self._passed(done)

    @torch.compiler.disable
    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        """Get a range from x, as in a forward of its own."""
        if not is_recomputed():
            self.forward(x)
            self._just_passed = False

    @property
    def _calibrates(self) -> bool:
        """Whether training batches are watched before there is a range."""
        return self.config.clip_max is None and self.config.method != "min_max"

    @torch.compiler.disable
    def _calibrate(self, x: Tensor, seen: int) -> None:
        """A training batch before there is a range. Compiled code breaks here until there is one."""
        if is_recomputed():
            return
        if seen >= self.start_step:
            self._observe(x)
        self._just_passed = seen + 1 == self.batches_needed
        if self._just_passed and self._calibrates:
            self.finish_calibration()
        else:
            self.batches_seen = seen + 1

    def _new_method(self) -> Any:
        options: dict[str, Any] = {}
        if self.config.calibration == "moving_average":
            options["averaging"] = self.config.averaging
        return range_method(self.config.calibration, **options)

    def _observe(self, x: Tensor) -> None:
        # Decorators would cost each of many small calls.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                self._observe(x)
            return
        # Between training batches anything may happen to the buffers; what is only collected is not kept in them.
        method = self._method if self._collecting else None
        if method is None:
            method = self._new_method()
            method.load_state({name: self._buffers["calibration_" + name] for name in method.state()})
        try:
            method.observe(x.detach())
        except CalibrationError as error:
            raise CalibrationError(f"{self.described()}: {error}") from error
        if not self._collecting:
            set_buffers(self, **{"calibration_" + name: value for name, value in method.state().items()})
        self._method = method

    @torch.inference_mode(False)
    def start_collecting(self) -> None:
        """Watch forwards in any mode, unquantized, until ``finish_calibration``; what was seen before is forgotten."""
        for name, value in self._new_method().state().items():
            self.register_buffer("calibration_" + name, value.to(self.scale.device))
        self._method, self._collecting, self.batches_collected, self._just_passed = None, True, 0, False

    def stop_collecting(self) -> None:
        """Watch no more; the range stays what it was."""
        self._collecting, self._method = False, None
        if not self._calibrates:
            # Its state dict stays that of a quantizer which needs no batches.
            for name in [name for name in self._buffers if name.startswith("calibration_")]:
                del self._buffers[name]

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Choose the range from what was seen, the same on all ranks."""
        self._collecting = False
        if self._method is None:
            raise CalibrationError(f"{self.described()} saw no data: run forwards that reach it, or leave it in float")
        low, high = self._method.range(*self.config.grid, symmetric=self.symmetric)
        low, high = average_over_ranks(low.float(), high.float())
        self.set_range(low.clamp(max=0), high.clamp(min=0))
        self.batches_seen = self.batches_needed
        self.stop_collecting()

    def described(self) -> str:
        """Where it is, as far as it is known here."""
        return getattr(self, "layer_name", None) or "an activation"

    def keep_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Remember the grid of this forward, which carries no gradient."""
        set_buffers(self, scale=scale, zero_point=zero_point)

    def extra_repr(self) -> str:
        config = self.config
        kind = f"{config.bits} bit" if config.format == "int" else config.format
        return f"{kind}, {config.method}{', symmetric' if self.symmetric else ''}"


def each_activation_quantizer(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
