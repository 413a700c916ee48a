# SPDX-License-Identifier: Apache-2.0
"""Quantization: which layers, on which grids, and the training or calibration of what they learn."""

from fxslim.quantization.calibration import calibrating as calibrating
from fxslim.quantization.calibration import quantize as quantize
from fxslim.quantization.planning import plan_quantization as plan_quantization
from fxslim.quantization.planning import prepare_qat as prepare_qat
from fxslim.quantization.quantization_plan import LayerPlan as LayerPlan
from fxslim.quantization.quantization_plan import QuantizationPlan as QuantizationPlan
from fxslim.quantization.switches import freeze_ranges as freeze_ranges
from fxslim.quantization.switches import switch_quantizers as switch_quantizers
from fxslim.quantization.targets import TARGETS as TARGETS
from fxslim.quantization.targets import Target as Target
