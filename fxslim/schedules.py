# SPDX-License-Identifier: Apache-2.0
"""Schedules: a value that moves from ``start`` to ``end`` while steps are counted.

A schedule is plain data; ``value_at(step)`` is a pure function, so a resumed run continues exactly.
Before ``begin`` the value is ``start``; from ``begin + steps`` on it is ``end``.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from fxslim.errors import ConfigError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Common part of all schedules.

    ``every`` is the number of steps between two changes: the value is held in between.

    >>> AGPSchedule(end=0.5, steps=2).value_at(1)
    0.4375
    >>> LinearSchedule(end=0.5, steps=10, every=5).value_at(7)
    0.25
    """

    name: ClassVar[str] = "constant"

    end: float
    steps: int = 1
    start: float = 0.0
    begin: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        for field in ("start", "end"):
            if not math.isfinite(getattr(self, field)):
                raise ConfigError(f"{field} must be a finite number, got {getattr(self, field)!r}")
        for field, least in (("steps", 1), ("begin", 0), ("every", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{field} must be an integer >= {least}, got {value!r}")

    def value_at(self, step: int) -> float:
        """The value in force at this step (counted from 0)."""
        done = step - self.begin
        if done >= self.steps:
            return self.end
        if done < 0:
            return self.start
        held = done - done % self.every
        return self._between(held / self.steps)

    def _between(self, fraction: float) -> float:
        return self.end

    def to_dict(self) -> dict[str, object]:
        """The schedule as plain data; ``schedule_from_dict`` reads it back."""
        return {"name": self.name, **asdict(self)}


class ConstantSchedule(Schedule):
    """``end`` from step ``begin`` on."""

    name = "constant"


class LinearSchedule(Schedule):
    """Equal changes at every step."""

    name = "linear"

    def _between(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * fraction


class AGPSchedule(Schedule):
    """Cubic (automated gradual pruning): fast while there is much to remove, slow near the end."""

    name = "agp"

    def _between(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - fraction) ** 3


class CosineSchedule(Schedule):
    """Half a cosine: slow, fast, slow."""

    name = "cosine"

    def _between(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


_SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (ConstantSchedule, LinearSchedule, AGPSchedule, CosineSchedule)
}


def schedule_from_dict(data: dict[str, object]) -> Schedule:
    """The schedule that ``to_dict`` wrote.

    >>> schedule_from_dict({"name": "agp", "end": 0.8, "steps": 10}).value_at(10)
    0.8
    """
    settings = dict(data)
    name = str(settings.pop("name", ""))
    if name not in _SCHEDULES:
        raise ConfigError(unknown_name("schedule", name, _SCHEDULES))
    known = ("end", "steps", "start", "begin", "every")
    for key in settings:
        if key not in known:
            raise ConfigError(unknown_name(f"key in schedule {name!r}", key, known))
    if "end" not in settings:
        raise ConfigError(f"schedule {name!r} needs 'end', got only {sorted(settings)}")
    return _SCHEDULES[name](**settings)  # type: ignore[arg-type]
