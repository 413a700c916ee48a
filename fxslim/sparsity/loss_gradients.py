# SPDX-License-Identifier: Apache-2.0
"""The mean magnitude of weight times gradient over a user's batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import CalibrationError, FxslimError
from fxslim.graph.recording import undisturbed


def gradient_scores(model: nn.Module, data: Data, names: Sequence[str]) -> dict[str, Tensor]:
    """For each of these parameters the sum over batches of |weight * gradient|, in eval mode."""
    states = dict(model.named_parameters(remove_duplicate=False))
    weights = [states[name] for name in names]
    frozen = [weight for weight in weights if not weight.requires_grad]
    sums = {name: torch.zeros_like(weight) for name, weight in zip(names, weights, strict=True)}
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.inference_mode(False), undisturbed(model, training=False), torch.enable_grad():
            for number, batch in enumerate(data):
                loss = _scored(model, data, number, batch)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for name, weight, gradient in zip(names, weights, gradients, strict=True):
                    if gradient is None:
                        raise CalibrationError(
                            f"{name}: the loss does not depend on it: skip it, or give data that takes this path"
                        )
                    if not gradient.isfinite().all():
                        raise CalibrationError(f"{name}: its gradient has NaN or infinity: mend data or weights")
                    sums[name] += (weight.detach() * gradient).abs()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return sums


def _scored(model: nn.Module, data: Data, number: int, batch: Any) -> Tensor:
    """The loss of a batch; an error names the batch."""
    try:
        loss = data.score(model, batch)
    except FxslimError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the loss of batch {number} of data failed: {type(error).__name__}: {error}; give batches that the model "
            "takes and targets that fit, or loss(outputs, batch)"
        ) from error
    if not loss.requires_grad:
        raise CalibrationError(
            f"the loss of batch {number} of data has no gradient: forward= and loss= must work without no_grad, "
            "inference_mode and detach"
        )
    return loss
