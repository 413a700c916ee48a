# SPDX-License-Identifier: Apache-2.0
"""How a layer is quantized: one frozen config for its weight, its input and its output."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from fxslim.errors import ConfigError, unknown_name

FLOAT_FORMATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1")
FORMATS = ("int", *FLOAT_FORMATS)
WEIGHT_METHODS = ("arq", "lsq", "dorefa", "binary")
GRANULARITIES = ("tensor", "channel", "group")
LEARNED_RANGES = ("ulq", "lsq", "lsq+", "pact")
ACTIVATION_METHODS = (*LEARNED_RANGES, "min_max", "static")
CALIBRATIONS = ("min_max", "moving_average", "percentile", "mse", "ifmr", "hfmg", "entropy")
_LEAST_BITS, _MOST_BITS = 2, 16


def _check_choice(value: Any, name: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ConfigError(unknown_name(name, str(value), known))


def _check_whole(value: Any, name: str, least: int, most: int | None = None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int)
    if wrong or value < least or (most is not None and value > most):
        bound = f">= {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a whole number {bound}, got {value!r}")


def _check_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class WeightQuant:
    """The grid of a weight, symmetric around 0.

    ``method``: "arq", the scale of each forward covers the weight as it is; "lsq", the scale is learned; "dorefa",
    through tanh; "binary", the sign times the mean magnitude (1 bit). ``granularity``: one scale per "tensor", output
    "channel", or "group" of ``group_size`` inputs of an output. ``format``: "int", or a float grid such as "fp8_e4m3".
    ``narrow`` leaves out the smallest integer, so that the grid is the same for a weight and its negative.
    ``reduce_range`` takes half of the integers: on x86 processors without VNNI no sum saturates then.
    """

    bits: int = 8
    format: str = "int"
    method: str = "arq"
    granularity: str = "channel"
    group_size: int | None = None
    narrow: bool = False
    reduce_range: bool = False

    def __post_init__(self) -> None:
        _check_choice(self.format, "weight.format", FORMATS)
        _check_choice(self.method, "weight.method", WEIGHT_METHODS)
        _check_choice(self.granularity, "weight.granularity", GRANULARITIES)
        if self.method == "binary":
            _check_whole(self.bits, "weight.bits of method 'binary'", 1, 1)
        elif self.format == "int":
            _check_whole(self.bits, "weight.bits", _LEAST_BITS, _MOST_BITS)
        if self.format != "int" and self.method != "arq":
            raise ConfigError(f"weight.format={self.format!r} needs method 'arq', got {self.method!r}")
        _check_flag(self.narrow, "weight.narrow")
        _check_flag(self.reduce_range, "weight.reduce_range")
        if self.reduce_range and (
            self.method not in ("arq", "lsq") or self.format != "int" or self.bits < _LEAST_BITS + 1
        ):
            raise ConfigError("weight.reduce_range is for integers of 3 bits or more with method 'arq' or 'lsq'")
        if self.granularity == "group":
            _check_whole(self.group_size, "weight.group_size", 1)
        elif self.group_size is not None:
            raise ConfigError(f"weight.group_size is for granularity 'group', not {self.granularity!r}")
        if self.method == "dorefa" and self.granularity != "tensor":
            raise ConfigError(f"weight.method 'dorefa' has one grid per tensor, got granularity {self.granularity!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """The smallest and the largest integer.

        >>> WeightQuant(bits=4).grid
        (-8, 7)
        """
        half = 1 << (self.bits - 1 - self.reduce_range)
        return -half + self.narrow, half - 1


@dataclass(frozen=True, kw_only=True)
class ActivationQuant:
    """The grid of an activation, one per tensor.

    ``method``: "ulq", both clips learned; "lsq", the scale learned; "lsq+", both clips learned with scaled gradients;
    "pact", the upper clip learned, what is below 0 cut off; "min_max", moving averages of the extrema in training, with
    rate ``averaging``; "static", what calibration found. All but min_max first see ``batch_num`` batches unquantized,
    of which ``calibration`` chooses the range; clips that are given need none. ``fixed_min``: the lower end stays 0.
    ``symmetric``, ``signed``: None where the deployment target decides; without one unsigned and asymmetric.
    """

    bits: int = 8
    format: str = "int"
    method: str = "ulq"
    symmetric: bool | None = None
    signed: bool | None = None
    calibration: str = "ifmr"
    batch_num: int = 1
    averaging: float = 0.01
    clip_min: float | None = None
    clip_max: float | None = None
    fixed_min: bool = False

    def __post_init__(self) -> None:
        _check_choice(self.format, "activation.format", FORMATS)
        _check_choice(self.method, "activation.method", ACTIVATION_METHODS)
        _check_choice(self.calibration, "activation.calibration", CALIBRATIONS)
        if self.format == "int":
            _check_whole(self.bits, "activation.bits", _LEAST_BITS, _MOST_BITS)
        elif self.method not in ("min_max", "static"):
            raise ConfigError(f"activation.format={self.format!r} needs method 'min_max' or 'static'")
        _check_whole(self.batch_num, "activation.batch_num", 1)
        _check_flag(self.fixed_min, "activation.fixed_min")
        for name in ("symmetric", "signed"):
            if getattr(self, name) is not None:
                _check_flag(getattr(self, name), f"activation.{name}")
        if self.symmetric and self.signed is False:
            raise ConfigError("activation.symmetric=True needs a signed grid: leave signed=None")
        if (
            isinstance(self.averaging, bool)
            or not isinstance(self.averaging, int | float)
            or not 0 < self.averaging <= 1
        ):
            raise ConfigError(f"activation.averaging must be a number in (0, 1], got {self.averaging!r}")
        self._check_clips()

    def _check_clips(self) -> None:
        if (self.clip_min is None) != (self.clip_max is None):
            raise ConfigError(
                f"give both clips or neither, got activation.clip_min={self.clip_min}, "
                f"activation.clip_max={self.clip_max}"
            )
        if self.clip_min is None or self.clip_max is None:
            return
        for name in ("clip_min", "clip_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"activation.{name} must be a finite number or None, got {value!r}")
        at_zero = self.fixed_min and self.clip_min == 0
        if not (self.clip_min < 0 or at_zero):
            raise ConfigError(f"activation.clip_min={self.clip_min} must be < 0: 0 lies inside of the range")
        if not self.clip_max > 0:
            raise ConfigError(f"activation.clip_max={self.clip_max} must be > 0: 0 lies inside of the range")

    @property
    def grid(self) -> tuple[int, int]:
        """The smallest and the largest integer.

        >>> ActivationQuant().grid, ActivationQuant(symmetric=True).grid
        ((0, 255), (-128, 127))
        """
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed or self.symmetric else (0, 2 * half - 1)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What of a layer is quantized, and how; None is left in float.

    ``start_step``: training batches that pass before anything is quantized. ``save_memory``: quantized weights are not
    kept for the backward, but made again there.
    """

    weight: WeightQuant | None = WeightQuant()
    activation: ActivationQuant | None = ActivationQuant()
    output: ActivationQuant | None = None
    start_step: int = 0
    save_memory: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("weight", WeightQuant), ("activation", ActivationQuant), ("output", ActivationQuant)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} must be a {kind.__name__} or None, got {value!r}")
        _check_whole(self.start_step, "start_step", 0)
        _check_flag(self.save_memory, "save_memory")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight is None and self.activation is None and self.output is None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that ``to_dict`` wrote, or one written by hand with the same keys.

        >>> QuantConfig.from_dict({"weight": {"bits": 4}, "activation": None}).weight.grid
        (-8, 7)
        """
        check_keys(data, "", _names(cls))
        parts: dict[str, Any] = dict(data)
        for name, kind in (("weight", WeightQuant), ("activation", ActivationQuant), ("output", ActivationQuant)):
            if isinstance(parts.get(name), Mapping):
                check_keys(parts[name], f"{name}.", _names(kind))
                parts[name] = at_path(name, kind, parts[name])
        return cls(**parts)


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def at_path(path: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """A ``kind`` of these values; errors name the keys as they are written at ``path``."""
    try:
        return kind(**values)
    except ConfigError as error:
        own = "weight." if kind is WeightQuant else "activation."
        raise ConfigError(str(error).replace(own, f"{path}.")) from error


def check_keys(data: Mapping[str, Any], path: str, known: Iterable[str]) -> None:
    """Keys of a config that do not exist are errors; the nearest is told."""
    known = list(known)
    for key in data:
        if key not in known:
            raise ConfigError(unknown_name("config key", f"{path}{key}", [f"{path}{name}" for name in known]))
