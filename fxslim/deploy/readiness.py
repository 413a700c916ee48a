# SPDX-License-Identifier: Apache-2.0
"""Whether a model's grids are final, and its masks what they should be."""

from torch import nn

from fxslim.errors import CalibrationError, PlanError
from fxslim.nn import MaskedWeights
from fxslim.nn.quantized_layers import unready
from fxslim.nn.quantizers import ActivationQuantizer, WeightQuantizer
from fxslim.patterns import check
from fxslim.patterns.weight_layout import layout_of

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


def refuse_violations(name: str, layer: MaskedWeights) -> None:
    """Raise where a masked weight does not follow the pattern of its mask."""
    for weight in layer.weight_names:
        found = check(layout_of(layer).rows(layer.masked(weight).detach()), layer.current_pattern)
        if found.violations:
            raise PlanError(
                f"{f'{name}.{weight}'.lstrip('.')} violates its pattern {found.pattern}: {found.violations} of its "
                f"{found.groups} blocks should be zero and are not. Its mask was changed, or a layer was pruned after "
                "it: make the masks anew (layer.refresh()), or convert with sparse=False. Nothing was changed"
            )
