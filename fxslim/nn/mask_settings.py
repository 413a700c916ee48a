# SPDX-License-Identifier: Apache-2.0
"""How a layer's mask is made and how it changes in training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxslim.errors import ConfigError, unknown_name
from fxslim.patterns import Pattern, as_pattern, pattern_from_dict
from fxslim.patterns.pattern import check_ratio
from fxslim.schedules import Schedule, schedule_from_dict

GRADIENTS = ("zero", "sr_ste")


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """A pattern and what happens to its mask while the layer trains.

    ``update_freq``: None, the mask stays as it is; 0, it is made anew at the first training batch; k, at every k-th,
    the first included. A batch is a forward in training mode; gradient checkpointing repeats it without counting.
    ``gradient``: masked weights get none ("zero"), or that of the weight they stand for plus ``decay`` times
    themselves ("sr_ste"), so that they can come back at a refresh.
    ``regrow``: at a refresh masked weights compete by this much of their gradient, brought to the scale of weights;
    by the gradient of the last backward through the layer, on several ranks that of rank 0, which broadcasts buffers.
    ``schedule``: the fraction that goes, of the pattern's, as ``step()`` is called.
    """

    pattern: Pattern
    update_freq: int | None = None
    gradient: str = "zero"
    decay: float = 2e-4
    regrow: float = 0.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        if self.pattern.removed() is None:
            raise ConfigError(f"pattern {self.pattern} says no ratio: give ratio=")
        freq = self.update_freq
        if freq is not None and (isinstance(freq, bool) or not isinstance(freq, int) or freq < 0):
            raise ConfigError(f"update_freq must be None or an integer >= 0, got {freq!r}")
        if self.gradient not in GRADIENTS:
            raise ConfigError(unknown_name("gradient", str(self.gradient), GRADIENTS))
        for name in ("decay", "regrow"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} must be a number >= 0, got {value!r}")
        if self.schedule is not None:
            _check_schedule(self.schedule)

    def pattern_at(self, step: int) -> Pattern:
        """The pattern in force after so many steps.

        >>> from fxslim.schedules import LinearSchedule
        >>> halfway = MaskSettings(pattern="2:4", schedule=LinearSchedule(end=0.5, steps=2))
        >>> str(halfway.pattern_at(1)), str(halfway.pattern_at(2))
        ('3:4', '2:4')
        """
        if self.schedule is None:
            return self.pattern
        # The share is 1 at the end, so that the pattern is then the same to the last bit.
        share = self.schedule.value_at(step) / self.schedule.end
        return self.pattern.gentler((self.pattern.removed() or 0.0) * share)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        schedule = None if self.schedule is None else self.schedule.to_dict()
        return {**asdict(self), "pattern": self.pattern.to_dict(), "schedule": schedule}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MaskSettings":
        """The settings that ``to_dict`` wrote."""
        check_keys(data)
        schedule = data.get("schedule")
        read = {"pattern": pattern_from_dict(data["pattern"]), "schedule": schedule and schedule_from_dict(schedule)}
        return cls(**{**data, **read})


def check_keys(settings: Mapping[str, Any]) -> None:
    """Names of settings must exist, and a pattern be among them."""
    known = [field.name for field in fields(MaskSettings)]
    for key in settings:
        if key not in known:
            raise ConfigError(unknown_name("mask setting", str(key), known))
    if "pattern" not in settings:
        raise ConfigError("the settings of a mask need pattern=, such as '2:4'")


def _check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise ConfigError(f"schedule must be one of fxslim.schedules, got {schedule!r}")
    check_ratio(schedule.start, "schedule.start")
    check_ratio(schedule.end, "schedule.end")
    if not schedule.start <= schedule.end or not schedule.end:
        raise ConfigError(f"schedule from {schedule.start} to {schedule.end}: masks grow, to more than 0")
