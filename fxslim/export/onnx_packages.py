# SPDX-License-Identifier: Apache-2.0
"""The packages that ONNX files need. They are optional, and looked for only when they are used."""

import importlib
from typing import Any

from fxslim.errors import ExportError


def onnx_package(name: str) -> Any:
    """onnx, onnx_ir, onnxscript or onnxruntime; an error that says how to install it where it is missing.

    >>> onnx_package("onnx").__name__
    'onnx'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"{name} can't be imported ({error}): ONNX files need the extra packages, pip install 'fxslim[onnx]'"
        ) from error
