# SPDX-License-Identifier: Apache-2.0
"""Which batch norms become part of the convolutions before them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxslim.plan.applied_plans import applied
from fxslim.quantization import QuantizationPlan
from fxslim.quantization.dataflow import Dataflow

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def find_norms(model: nn.Module, layers: Mapping[str, nn.Module], flows: Iterable[Dataflow]) -> dict[str, str]:
    """{layer: the batch norm behind it that becomes part of it}."""
    found: dict[str, str] = {}
    for plan in applied(model):
        if isinstance(plan, QuantizationPlan):
            found |= plan.folds
    for number, flow in enumerate(flows):
        seen = {call.name: flow.norm_behind(call) for call in flow.recording.calls if call.name in layers}
        # What one forward does not show another may forbid.
        kept = {name: norm for name, norm in seen.items() if norm is not None}
        found = {**found, **kept} if number == 0 else {k: v for k, v in found.items() if seen.get(k, v) == v}
    return {name: norm for name, norm in found.items() if name in layers and _can_fold(model, layers[name], norm)}


def _can_fold(model: nn.Module, layer: nn.Module, norm: str) -> bool:
    module: Any = model.get_submodule(norm)
    return (
        isinstance(layer, nn.modules.conv._ConvNd)
        and type(module) in _NORMS
        and module.running_var is not None
        and getattr(layer, "output_quantizer", None) is None
    )
