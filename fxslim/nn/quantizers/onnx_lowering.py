# SPDX-License-Identifier: Apache-2.0
"""What quantizers become while a model is exported to ONNX: QuantizeLinear and DequantizeLinear.

Grids that these operators don't know are written as plain arithmetic.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxslim.errors import ExportError, FxslimError

_FLOAT_TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def is_lowering() -> bool:
    """Whether this forward is being written as ONNX."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Errors in here are warnings too: torch's exporter goes on in another way, and ends with an error of that one."""
    try:
        yield
    except FxslimError as error:
        warnings.warn(f"the model can't be written as ONNX: {error}", stacklevel=2)
        raise


def lowered_activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: tuple[int, int], format: str = "int"
) -> Tensor:
    """x on a grid; ``levels``: the smallest and the largest integer."""
    if format != "int":
        return _on_float_grid(x, scale, format)
    dtype = torch.uint8 if levels[0] >= 0 else torch.int8
    limits = torch.iinfo(dtype)
    if not limits.min <= levels[0] <= levels[1] <= limits.max:
        return _by_arithmetic(x, scale, zero_point, levels)
    given = x if x.dtype == torch.float32 else x.float()
    if levels != (limits.min, limits.max):
        # The operator ends where its type ends; a narrower grid is cut off before.
        ends = [(end - zero_point.to(scale.dtype)) * scale for end in levels]
        given = torch.minimum(torch.maximum(given, ends[0]), ends[1])
    return _there_and_back(given, scale, zero_point.to(dtype), dtype).to(x.dtype)


def check_format(format: str, name: str) -> None:
    """Raise for grids of activations that no operator knows."""
    if format != "int" and format not in _FLOAT_TYPES:
        raise ExportError(
            f"{name} is in {format}, for which ONNX has no operator: quantize it to integers or to "
            f"{' or '.join(_FLOAT_TYPES)}"
        )


def _there_and_back(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    steps = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero_point), dtype=dtype, shape=x.shape)
    return torch.onnx.ops.symbolic("DequantizeLinear", (steps, scale, zero_point), dtype=x.dtype, shape=x.shape)


def _on_float_grid(x: Tensor, scale: Tensor, format: str) -> Tensor:
    dtype = _FLOAT_TYPES[format]
    return _there_and_back(x.float(), scale, torch.zeros((), dtype=dtype), dtype).to(x.dtype)


def _by_arithmetic(x: Tensor, scale: Tensor, zero_point: Tensor, levels: tuple[int, int]) -> Tensor:
    middle = zero_point.to(scale.dtype)
    steps = torch.round(x.to(scale.dtype) / scale).clamp(levels[0] - middle, levels[1] - middle)
    return (steps * scale).to(x.dtype)


def lowered_weight(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """Integers times their scales; ``axis``: along which there is one scale each."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    result = torch.onnx.ops.symbolic(
        "DequantizeLinear", (integers, scale, zero_point), attributes, dtype=torch.float32, shape=integers.shape
    )
    return result.to(dtype)
