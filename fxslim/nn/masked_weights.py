# SPDX-License-Identifier: Apache-2.0
"""What all masked layers share: one mask per weight, multiplied in wherever the weight is used.

The weight keeps the values of masked entries: where a mask is made anew they compete with what they were. What the
layer computes with, and the gradient, knows only the kept ones.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError, UnsupportedLayerError
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.mask_settings import MaskSettings, check_keys
from fxslim.nn.quantizers.phases import is_recomputed
from fxslim.patterns import Pattern, as_pattern
from fxslim.patterns.weight_layout import layout_of
from fxslim.schedules import Schedule

_MASK, _GRADIENT = "_mask", "_gradient"


class _StraightThrough(torch.autograd.Function):
    """Masked forward; backward the whole gradient, and a decay of what is masked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        weight, mask, ctx.decay = inputs
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, mask = ctx.saved_tensors
        return grads[0] + torch.where(mask, 0, ctx.decay * weight), None, None


def refresh_if_due(layer: "MaskedWeights", args: Any) -> None:
    """A forward pre-hook. That there is one also keeps torch's fused encoder layers from reading the plain weights."""
    layer.before_batch()


class MaskedWeights(nn.Module):
    """Mixed into a layer: its weights count only where their masks are True.

    Each mask is a buffer beside its weight: ``weight_mask``. Counters are buffers too, so that a loaded state goes on.
    """

    float_class: ClassVar[type[nn.Module]]
    mask_settings: MaskSettings
    num_mask_batches: Tensor
    num_mask_steps: Tensor

    def __init__(
        self,
        *args: Any,
        pattern: Any,
        ratio: float | None = None,
        update_freq: int | None = None,
        gradient: str = "zero",
        decay: float = 2e-4,
        regrow: float = 0.0,
        schedule: Schedule | None = None,
        **kwargs: Any,
    ) -> None:
        chosen = MaskSettings(
            pattern=as_pattern(pattern).at(ratio), update_freq=update_freq, gradient=gradient, decay=decay,
            regrow=regrow, schedule=schedule,
        )  # fmt: skip
        super().__init__(*args, **kwargs)
        self._check_fit(chosen.pattern)
        self.start_masking(chosen)
        self.refresh()

    @property
    def maskable(self) -> tuple[str, ...]:
        """The parameters that may have masks."""
        return ("weight",)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The parameters that have masks."""
        return tuple(name for name in self.maskable if name + _MASK in self._buffers)

    @classmethod
    def from_float(cls, layer: nn.Module, **settings: Any) -> Self:
        """A masked layer with the same Parameter objects, attributes and hooks; its mask by magnitude.

        ``settings`` are those of ``MaskSettings``, and ``ratio``.
        """
        if type(layer) is not cls.float_class:
            raise UnsupportedLayerError(
                f"{cls.__name__}.from_float takes a {cls.float_class.__name__}, got a {type(layer).__name__}: "
                "a subclass may compute something else"
            )
        ratio = settings.pop("ratio", None)
        check_keys(settings)
        chosen = MaskSettings(**{**settings, "pattern": as_pattern(settings["pattern"]).at(ratio)})
        masked = copied_as(layer, cls)
        computed = [name for name in masked.maskable if name not in masked._parameters]
        if computed:
            raise UnsupportedLayerError(
                f"{computed[0]} of this {cls.float_class.__name__} is no parameter: it is computed before each forward "
                "(weight_norm, spectral_norm, torch.nn.utils.prune): remove that first"
            )
        masked._check_fit(chosen.pattern)
        masked.start_masking(chosen)
        masked.refresh()
        return masked

    def _check_fit(self, pattern: Pattern) -> None:
        layout = layout_of(self)
        for name in self.maskable:
            obstacle = pattern.obstacle(tuple(layout.rows(self.stored(name)).shape), layout.groups)
            if obstacle:
                raise ConfigError(f"{name} of this {self.float_class.__name__}: {obstacle}; leave the layer plain")

    def to_float(self) -> nn.Module:
        """The plain layer, with zeros in its weights; this one stays as it is."""
        plain = copied_as(self, self.float_class)
        for name in self.weight_names:
            weight = self.stored(name)
            plain.register_parameter(name, nn.Parameter(self.masked(name).detach().clone(), weight.requires_grad))
        strip_masks(plain, self.weight_names)
        return plain

    def start_masking(self, settings: MaskSettings, names: Iterable[str] | None = None) -> None:
        """Add the buffers for these parameters, by default all; nothing is masked yet."""
        self.mask_settings = settings
        for name in self.maskable if names is None else names:
            weight = self.stored(name)
            self.register_buffer(name + _MASK, torch.ones_like(weight, dtype=torch.bool))
            if settings.regrow:
                self.register_buffer(name + _GRADIENT, torch.zeros_like(weight))
        counters = {"num_mask_batches": settings.update_freq, "num_mask_steps": settings.schedule}
        device = next(self.parameters()).device
        for counter, wanted in counters.items():
            if wanted is not None:
                self.register_buffer(counter, torch.zeros((), dtype=torch.int64, device=device))
        self.register_forward_pre_hook(refresh_if_due)

    def stored(self, name: str = "weight") -> Tensor:
        """The parameter itself, with the values of masked entries; the attribute may show what is masked."""
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def masked(self, name: str = "weight") -> Tensor:
        """A weight as the layer computes with it."""
        weight, mask = self.stored(name), self._buffers.get(name + _MASK)
        if mask is None:
            return weight
        settings = self.mask_settings
        if settings.gradient == "sr_ste" and weight.requires_grad:
            result = _StraightThrough.apply(weight, mask, settings.decay)
        else:
            result = torch.where(mask, weight, 0)
        if settings.regrow and self.training and result.requires_grad:
            result.register_hook(functools.partial(self._see_gradient, name))
        return result

    def computed(self, name: str = "weight") -> Tensor:
        """A weight as it goes into the layer's arithmetic: masked, and whatever a subclass does besides."""
        return self.masked(name)

    def terms(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as they go into the layer's arithmetic."""
        bias: Any = self.bias
        return self.computed(), bias

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        setattr(self, name + _GRADIENT, gradient.detach().clone())

    def set_mask(self, mask: Tensor, name: str = "weight") -> None:
        """Another mask. A new tensor, since graphs that wait for their backward hold the old one."""
        old = getattr(self, name + _MASK)
        if mask.shape != old.shape:
            raise ConfigError(f"the mask of {name} is {tuple(old.shape)}, got {tuple(mask.shape)}")
        # It lies in memory as the weight does, whatever the pattern made.
        setattr(self, name + _MASK, torch.empty_like(old).copy_(mask.detach()))

    @property
    def current_pattern(self) -> Pattern:
        """The pattern in force: with a schedule a gentler one before its end."""
        steps = getattr(self, "num_mask_steps", None)
        return self.mask_settings.pattern_at(0 if steps is None or steps.is_meta else int(steps))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the masks anew from the weights as they are."""
        layout, pattern = layout_of(self), self.current_pattern
        for name in self.weight_names:
            scores = self._scores(name)
            self.set_mask(layout.restored(pattern.mask(layout.rows(scores))), name)

    def _scores(self, name: str) -> Tensor:
        """Magnitudes; with ``regrow`` what is masked counts by its gradient, once there is one."""
        weight, settings = self.stored(name).detach().abs(), self.mask_settings
        if not settings.regrow:
            return weight
        mask, gradient = getattr(self, name + _MASK), getattr(self, name + _GRADIENT).abs()
        # Half precision has no room for the quotients. Steps that loss scaling gives up leave infinite gradients.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        gradient = torch.where(gradient.isfinite(), gradient, 0).to(dtype)
        share = gradient / gradient.mean().clamp(min=torch.finfo(dtype).tiny)
        return torch.where(mask | ~gradient.any(), weight, settings.regrow * weight.to(dtype).mean() * share)

    def before_batch(self) -> None:
        """Count a training batch, and make the masks anew where that is due."""
        frequency = self.mask_settings.update_freq if self.weight_names else None
        if frequency is None or not self.training or self.num_mask_batches.is_meta or is_recomputed():
            return
        # In inference mode, too, what is made here must be fit for training later.
        with torch.inference_mode(False):
            seen = int(self.num_mask_batches)
            if seen == 0 or (frequency and seen % frequency == 0):
                self.refresh()
            self.num_mask_batches = self.num_mask_batches + 1

    def step(self) -> None:
        """One step of the schedule."""
        if self.mask_settings.schedule is None:
            raise ConfigError("this layer's mask has no schedule: give schedule= when it is made sparse")
        self.num_mask_steps = self.num_mask_steps + 1
        self.refresh()

    def extra_repr(self) -> str:
        pattern = f"pattern={self.mask_settings.pattern}" if self.weight_names else ""
        return ", ".join(filter(None, [super().extra_repr(), pattern]))


def drop_masks(layer: nn.Module, weight_names: tuple[str, ...]) -> None:
    """Take the masks away; the layer stays a counterpart."""
    added = [name + suffix for name in weight_names for suffix in (_MASK, _GRADIENT)]
    for name in [*added, "num_mask_batches", "num_mask_steps"]:
        layer._buffers.pop(name, None)
    layer.__dict__.pop("mask_settings", None)


def strip_masks(layer: nn.Module, weight_names: tuple[str, ...]) -> None:
    """Take away what ``start_masking`` added."""
    drop_masks(layer, weight_names)
    layer.__dict__.pop("float_class", None)
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refresh_if_due]:
        del hooks[key]
