# SPDX-License-Identifier: Apache-2.0
"""Schedules: their formulas at chosen steps, their ends, their errors, their plain data."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxslim import ConfigError
from fxslim.schedules import (
    AGPSchedule,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    schedule_from_dict,
)

KINDS = [ConstantSchedule, LinearSchedule, AGPSchedule, CosineSchedule]


@pytest.mark.parametrize(
    "schedule, values",
    [
        (ConstantSchedule(end=0.5, begin=2), {0: 0.0, 1: 0.0, 2: 0.5, 9: 0.5}),
        (LinearSchedule(start=0.2, end=0.6, steps=4), {0: 0.2, 1: 0.3, 3: 0.5, 4: 0.6, 40: 0.6}),
        (AGPSchedule(end=0.8, steps=10), {0: 0.0, 5: 0.7, 9: 0.7992, 10: 0.8}),
        (AGPSchedule(end=0.8, steps=10, begin=3, every=5), {2: 0.0, 7: 0.0, 8: 0.7, 12: 0.7, 13: 0.8}),
        (CosineSchedule(start=1.0, end=0.0, steps=4), {0: 1.0, 1: 0.8535534, 2: 0.5, 4: 0.0}),
    ],
    ids=str,
)
def test_values(schedule: Schedule, values: dict[int, float]) -> None:
    for step, value in values.items():
        assert schedule.value_at(step) == pytest.approx(value, abs=1e-7), step


@given(
    kind=st.sampled_from(KINDS),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.integers(1, 50),
    begin=st.integers(0, 20),
    every=st.integers(1, 7),
)
def test_a_schedule_moves_one_way_between_its_ends_and_round_trips(kind, start, end, steps, begin, every) -> None:
    schedule = kind(start=start, end=end, steps=steps, begin=begin, every=every)
    values = [schedule.value_at(step) for step in range(begin + steps + 5)]
    assert values[-1] == end
    assert all(v == start for v in values[:begin])
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9
    assert all(low <= v <= high for v in values)
    changes = [b - a for a, b in itertools.pairwise(values)]
    assert all(c * (end - start) >= -1e-12 for c in changes)
    assert schedule_from_dict(schedule.to_dict()) == schedule
    assert type(schedule_from_dict(schedule.to_dict())) is kind


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AGPSchedule(end=float("nan")), "end must be a finite number, got nan"),
        (lambda: AGPSchedule(end=0.5, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: AGPSchedule(end=0.5, every=1.5), "every must be an integer >= 1, got 1.5"),
        (lambda: AGPSchedule(end=0.5, begin=-1), "begin must be an integer >= 0, got -1"),
        (lambda: schedule_from_dict({"name": "cubic", "end": 1}), "unknown schedule 'cubic'"),
        (lambda: schedule_from_dict({"name": "agp", "end": 1, "step": 3}), "did you mean 'steps'"),
        (lambda: schedule_from_dict({"name": "agp"}), "schedule 'agp' needs 'end'"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
