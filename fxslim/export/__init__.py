# SPDX-License-Identifier: Apache-2.0
"""Out of training: files for runtimes."""

from fxslim.export.onnx_export import export_onnx as export_onnx
from fxslim.export.onnx_verification import OnnxVerification as OnnxVerification
from fxslim.export.onnx_verification import verify_onnx as verify_onnx
from fxslim.export.qat_conversion import convert_qat_model as convert_qat_model
