# SPDX-License-Identifier: Apache-2.0
"""Whether a quantized model's grids are final."""

from torch import nn

from fxslim.errors import CalibrationError
from fxslim.nn.quantized_layers import unready
from fxslim.nn.quantizers import ActivationQuantizer, WeightQuantizer

_SHOWN = 5


def refuse_unready(model: nn.Module) -> None:
    """Raise where quantizers have no range yet, or are switched off; names them, and how many batches are missing."""
    obstacles = [
        f"{getattr(module, 'layer_name', None) or name} {obstacle}"
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer | WeightQuantizer) and (obstacle := unready(module))
    ]
    if obstacles:
        more = "" if len(obstacles) <= _SHOWN else f"; and {len(obstacles) - _SHOWN} more"
        raise CalibrationError(
            f"{len(obstacles)} quantizers are not ready: {'; '.join(obstacles[:_SHOWN])}{more}. Nothing was changed"
        )
