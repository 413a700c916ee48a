# SPDX-License-Identifier: Apache-2.0
"""torch.ao's quantization in graph mode (FX) on the same networks: convolutions and norms fused, x86's operators."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]
# As ranges of weights are given to its observers.
FOUR_BITS = {"quant_min": -8, "quant_max": 7}


def _mapping(bits: int, activation: Any, weight: Any, symmetric: Any) -> Any:
    from torch.ao.quantization import QConfig, QConfigMapping

    limits = FOUR_BITS if bits == 4 else {"quant_min": -128, "quant_max": 127}
    weights = weight.with_args(dtype=torch.qint8, qscheme=symmetric, **limits)
    return QConfigMapping().set_global(QConfig(activation=activation, weight=weights))


def prepare_trained(base: nn.Module, example: Tensor, bits: int, reduce_range: bool) -> nn.Module:
    """Ready for QAT: moving averages of the extrema, in its fused operator; for x86 activations have 7 bits."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize as Fused
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    activation = Fused.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=reduce_range
    )
    weight = Fused.with_args(observer=MovingAveragePerChannelMinMaxObserver)
    mapping = _mapping(bits, activation, weight, torch.per_channel_symmetric)
    return prepare_qat_fx(copy.deepcopy(base).train(), mapping, (example,))


def prepare_calibrated(base: nn.Module, example: Tensor, batches: Batches, bits: int, reduce_range: bool) -> nn.Module:
    """Observed: histograms of activations, extrema of weights."""
    from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_fx

    activation = HistogramObserver.with_args(reduce_range=reduce_range)
    mapping = _mapping(bits, activation, PerChannelMinMaxObserver, torch.per_channel_symmetric)
    model = prepare_fx(copy.deepcopy(base).eval(), mapping, (example,))
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    return model


def simulated(model: Any) -> nn.Module:
    """In floats on the grids: trained models as they trained, observed ones as its reference computes them."""
    from torch.ao.quantization import FakeQuantizeBase, disable_observer
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx

    model = copy.deepcopy(model).eval()
    if any(isinstance(module, FakeQuantizeBase) for module in model.modules()):
        return model.apply(disable_observer)
    return convert_to_reference_fx(model)


def converted(model: Any) -> nn.Module:
    """Computed in integers, by x86's kernels."""
    from torch.ao.quantization.quantize_fx import convert_fx

    torch.backends.quantized.engine = "x86"
    return convert_fx(copy.deepcopy(model).eval())
