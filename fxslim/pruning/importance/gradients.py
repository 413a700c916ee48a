# SPDX-License-Identifier: Apache-2.0
"""Gradients of the loss sample by sample, and what criteria of weight times gradient have in common."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.graph.recording import undisturbed
from fxslim.graph.slots import Slot
from fxslim.pruning.importance.aggregation import SlotValue, WeightImportance
from fxslim.pruning.importance.criterion import Context, check_choice
from fxslim.pruning.importance.samples import single_samples


@contextlib.contextmanager
def requiring_gradients(states: dict[str, Tensor]) -> Iterator[None]:
    """Weights that are frozen in training get gradients too; afterwards they are frozen again."""
    frozen = [state for state in states.values() if not state.requires_grad]
    try:
        for state in frozen:
            state.requires_grad_(True)
        yield
    finally:
        for state in frozen:
            state.requires_grad_(False)


@contextlib.contextmanager
def plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as plain operators: cuDNN has no gradients in eval mode, and fused ones hide what they read."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def sample_gradients(context: Context, criterion: str, names: Iterable[str], per: str) -> Iterator[dict[str, Tensor]]:
    """For each sample the gradients of the weights that its loss reaches, in eval mode, where samples are independent.

    The model, its gradients and its flags are afterwards as they were.
    """
    data = context.required_data(criterion)
    states = {name: context.states[name] for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(context.model, training=False))
        stack.enter_context(requiring_gradients(states))
        stack.enter_context(plain_recurrence(context.model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for batch in data:
            for sample in single_samples(batch) if per == "sample" else [batch]:
                loss = data.score(context.model, sample)
                if not loss.requires_grad:
                    raise ConfigError(
                        f"importance={criterion!r}: the loss depends on no weight; "
                        "forward(model, batch) and loss(outputs, batch) must not detach or run under no_grad"
                    )
                found = torch.autograd.grad(loss, list(states.values()), allow_unused=True)
                yield {name: g.detach() for name, g in zip(states, found, strict=True) if g is not None}


@dataclass(frozen=True, kw_only=True)
class GradientImportance(WeightImportance):
    """A criterion of weight times gradient, in the mean over samples.

    ``per``: "sample" cuts batches into samples; "batch" takes each batch as one, which is faster, and lets the
    gradients of its samples cancel out.
    """

    missing: ClassVar[str] = "are reached by no gradient of the loss"
    per: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "per", self.per, ("sample", "batch"))

    def of_sample(self, product: Tensor, slot: Slot, context: Context) -> np.ndarray:
        """A value for each class of a slot from the weight times its gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no method of_sample(product, slot, context)")

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Means over samples, for the slots whose weights the loss reaches."""
        slots: dict[str, list[Slot]] = {}
        for slot in self.slots(context):
            slots.setdefault(slot.name, []).append(slot)
        sums: dict[str, list[np.ndarray]] = {}
        num_samples = 0
        gains = [context.gains[name][0] for name in slots if name in context.gains]
        for gradients in sample_gradients(context, self.name, [*slots, *gains], self.per):
            num_samples += 1
            for name in [name for name in slots if name in gradients]:
                product = context.with_gradient(name, gradients)
                terms = [self.of_sample(product, slot, context) for slot in slots[name]]
                sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(terms)), terms, strict=True)]
        for name, found in sums.items():
            for slot, values in zip(slots[name], found, strict=True):
                if not np.isfinite(values).all():
                    raise ConfigError(
                        f"importance={self.name!r}: weight times gradient of {name} is NaN or infinite in "
                        f"{int((~np.isfinite(values)).sum())} of {len(values)} channels: mend weights, data or loss"
                    )
                yield SlotValue(slot=slot, values=values / num_samples)
