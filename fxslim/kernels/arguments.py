# SPDX-License-Identifier: Apache-2.0
"""Checks on kernel arguments: each error names the argument and its value.

Values inside tensors are looked at only where that is free: on the CPU, outside torch.compile.
Elsewhere an unusable scale turns its outputs into NaN, on every device alike.
"""

import math

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_GRID = 65535


def math_dtype(x: Tensor) -> torch.dtype:
    """What arithmetic on x is done in, and the dtype of its scales: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lies_channels_last(x: Tensor) -> bool:
    """Whether x lies in channels-last order: the order in which it is walked, and its result laid."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=memory_format)


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where it already lies in this order, else a copy that does."""
    if not channels_last:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def check_input(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise DtypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise DtypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise DtypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_axis(axis: int | None, x: Tensor) -> int | None:
    """The axis counted from the front."""
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise DtypeError(f"axis must be an int or None, got {axis!r}")
    if not -x.dim() <= axis < x.dim():
        raise ConfigError(f"axis={axis} does not exist in an input of shape {tuple(x.shape)}")
    return axis % x.dim()


def check_grid(quant_min: int, quant_max: int) -> None:
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{name} must be an int, got {value!r}")
        if abs(value) > _MAX_GRID:
            raise ConfigError(f"{name}={value} is outside [-{_MAX_GRID}, {_MAX_GRID}]")
    if not quant_min < quant_max:
        raise ConfigError(f"quant_min={quant_min} must be below quant_max={quant_max}")
    if quant_max - quant_min > _MAX_GRID:
        raise ConfigError(f"quant_min={quant_min}, quant_max={quant_max}: at most {_MAX_GRID + 1} steps (16 bits)")


def middle_of_grid(quant_min: int, quant_max: int) -> int:
    """The zero point of a symmetric grid."""
    return 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2


def check_symmetric(quant_min: int, quant_max: int) -> None:
    middle = middle_of_grid(quant_min, quant_max)
    if not quant_min < middle < quant_max:
        raise ConfigError(
            f"quant_min={quant_min}, quant_max={quant_max}: a symmetric grid needs a step on both sides of {middle}"
        )


def as_parameter(value: Tensor | float, name: str, x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """A per-tensor or per-channel parameter as a vector on x's device; a number stands for every channel."""
    count = 1 if axis is None else x.shape[axis]
    if not isinstance(value, Tensor):
        return torch.full((count,), _number(value, name, dtype), dtype=dtype, device=x.device)
    if value.device != x.device:
        raise ConfigError(f"{name} is on {value.device}, the input on {x.device}")
    if value.dtype == torch.bool or value.dtype.is_complex or (dtype == torch.int32 and value.is_floating_point()):
        raise DtypeError(f"{name} has dtype {value.dtype}" + (", expected integers" if dtype == torch.int32 else ""))
    if value.numel() != count:
        where = "per tensor" if axis is None else f"axis={axis} of shape {tuple(x.shape)}"
        raise ConfigError(f"{name} has {value.numel()} values, expected {count} ({where})")
    if value.dtype == torch.int64 and dtype == torch.int32:
        value = value.clamp(-_MAX_GRID - 1, _MAX_GRID + 1)
    return value.reshape(count).to(dtype)


def _number(value: float, name: str, dtype: torch.dtype) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(f"{name} must be a number or a Tensor, got {value!r}")
    if dtype == torch.int32:
        if not -_MAX_GRID <= value <= _MAX_GRID or value != int(value):
            raise ConfigError(f"{name}={value} must be a whole number in [-{_MAX_GRID}, {_MAX_GRID}]")
    elif abs(value) > torch.finfo(dtype).max:
        raise ConfigError(f"{name}={value} must be a finite number of {dtype}")
    return value


def check_values(values: Tensor, name: str, least: float, most: float) -> None:
    """Raise unless every value lies in [least, most]; ``least=0`` with an infinite ``most`` means > 0."""
    if torch.compiler.is_compiling() or type(values) not in (Tensor, torch.nn.Parameter):
        return
    if values.device.type != "cpu":
        return
    for i, value in enumerate(values.tolist()):
        positive = most == math.inf and least == 0
        good = 0 < value < math.inf if positive else least <= value <= most
        if not good:
            at = f"{name}[{i}]" if values.numel() > 1 else name
            bound = "a finite number > 0" if positive else f"in [{least:g}, {most:g}]"
            raise ConfigError(f"{at}={value} must be {bound}")


def check_positive(values: Tensor, name: str) -> None:
    check_values(values, name, 0, math.inf)
