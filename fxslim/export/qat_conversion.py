# SPDX-License-Identifier: Apache-2.0
"""Splits a QDQ file into a file that simulates and a file that is deployed on Ascend."""

import os
from pathlib import Path

from fxslim.errors import ExportError
from fxslim.export.ascend_form import build_ascend_form
from fxslim.export.fake_quant_form import build_fake_quant_form
from fxslim.export.qdq_files import load_qdq
from fxslim.export.saved_models import save_models


def convert_qat_model(onnx_path: str | os.PathLike[str], prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes ``<prefix>_fake_quant_model.onnx``, which ONNX Runtime runs, and ``<prefix>_deploy_model.onnx``, for
    Ascend's compiler; gives both paths. ``onnx_path`` is a file with QuantizeLinear and DequantizeLinear.

    A prefix that ends in ``/`` names a folder: the files are then ``fake_quant_model.onnx`` and ``deploy_model.onnx``.
    """
    folder, base = os.path.split(os.fspath(prefix))
    start = f"{base}_" if base else ""
    fake_quant, deploy = (Path(folder) / f"{start}{kind}_model.onnx" for kind in ("fake_quant", "deploy"))
    for path in (fake_quant, deploy):
        if path.exists() and os.path.samefile(path, onnx_path):
            raise ExportError(f"{path} would overwrite the file that is converted; choose another prefix")
    source = load_qdq(onnx_path)
    save_models(
        {
            fake_quant: (build_fake_quant_form(source), "fakequant"),
            deploy: (build_ascend_form(source), "deploy"),
        }
    )
    return fake_quant, deploy
