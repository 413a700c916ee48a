# SPDX-License-Identifier: Apache-2.0
"""What the rows of one network amount to: means over trainings, who is on the front, who beats whom."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.front.cells import FLOAT, TRAINED_ON
from benchmarks.front.latencies import Latency
from benchmarks.tasks.paired_intervals import Interval, paired_interval

# Times of two files that differ by less are the same.
SAME_TIME = 1.02
# Accuracy points that a user may be ready to pay.
ONE_POINT = 1.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A row over all trainings: accuracies in percent, latencies by batch size, bytes; or why there are none."""

    number: int
    name: str
    by: str
    accuracies: tuple[float, ...] = ()
    latencies: tuple[tuple[Latency, ...], ...] = ()
    bytes: float = 0.0
    error: str = ""

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    def milliseconds(self, size: int) -> float:
        """Of the size with this place in SIZES, the mean over trainings."""
        return statistics.fmean(some[size].milliseconds for some in self.latencies)

    def faster(self, size: int) -> float:
        return statistics.fmean(some[size].faster for some in self.latencies)

    def beside(self, other: "Standing") -> Interval:
        """By how many points it is above, paired by training."""
        return paired_interval(list(self.accuracies), list(other.accuracies))


Measure = Callable[[Standing], float]
# What is to be small, by name: the reciprocal of speed-ups, which were measured in the same rounds, and bytes.
AXES: dict[str, Measure] = {
    "batch 1": lambda one: 1 / one.faster(0),
    "batch 16": lambda one: 1 / one.faster(1),
    "size": lambda one: one.bytes,
}


def made(standings: list[Standing]) -> list[Standing]:
    return [one for one in standings if not one.error]


def reference(standings: list[Standing]) -> Standing:
    """The better of the float networks: as trained, and trained on like all others."""
    floats = [one for one in made(standings) if one.name in (FLOAT, TRAINED_ON)]
    return max(floats, key=lambda one: one.accuracy)


def front(standings: list[Standing], measure: Measure) -> list[Standing]:
    """Those that none other matches in one and beats in the other, the smallest first."""
    found: list[Standing] = []
    for one in sorted(made(standings), key=lambda one: (measure(one), -one.accuracy)):
        if not found or one.accuracy > found[-1].accuracy:
            found.append(one)
    return found


def best_within(standings: list[Standing], points: float, measure: Measure) -> Standing:
    """fxslim's smallest that loses at most these points of the float network's mean accuracy; of equals the best."""
    least = reference(standings).accuracy - points
    good = [one for one in made(standings) if one.by == "fxslim" and one.accuracy >= least]
    smallest = min(measure(one) for one in good)
    return max((one for one in good if measure(one) <= smallest * SAME_TIME), key=lambda one: one.accuracy)


def rival_of(peer: Standing, standings: list[Standing], measure: Measure) -> Standing | None:
    """fxslim's most accurate that is as small as the peer's, if any is."""
    limit = measure(peer) * SAME_TIME
    fit = [one for one in made(standings) if one.by == "fxslim" and measure(one) <= limit]
    return max(fit, key=lambda one: one.accuracy, default=None)


def verdict(peer: Standing, standings: list[Standing], measure: Measure) -> str:
    """A cell of the table of peers."""
    rival = rival_of(peer, standings, measure)
    if rival is None:
        return "**none as small**"
    found = rival.beside(peer)
    word = "better" if found.mean > 0 else "**worse**" if found.clear else "equal within the interval"
    return f"{rival.name}: {found}, {word}"
