# SPDX-License-Identifier: Apache-2.0
"""Runs a model on a user's batches while its weights are watched."""

from collections.abc import Callable

import torch
from torch import nn

from fxslim.batches import Data
from fxslim.errors import CalibrationError
from fxslim.graph.recording import undisturbed
from fxslim.graph.weight_uses import WeightUses, watched


def run_all(model: nn.Module, data: Data, uses: WeightUses, start: Callable[[int], None]) -> None:
    """All batches through the model, watched; an error in a forward names the batch."""
    with torch.inference_mode(False), undisturbed(model, training=False), torch.no_grad():
        for number, batch in enumerate(data):
            start(number)
            try:
                with watched(model, uses):
                    data.forward(model, batch)
            except CalibrationError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"the model's forward failed on batch {number} of data: {type(error).__name__}: {error}; give "
                    "batches that the model takes, or forward(model, batch)"
                ) from error
            finally:
                uses.forget_copies()
