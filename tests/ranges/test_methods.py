# SPDX-License-Identifier: Apache-2.0
"""Every method against its definition, written out on the data itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim.kernels import quantization_errors
from fxslim.ranges import hfmg, range_method
from fxslim.ranges.integer_grids import integer_grid
from tests.ranges.samples import SAMPLES, true_error

every_sample = pytest.mark.parametrize("name", SAMPLES)
GRIDS = [(-128, 127, False), (-128, 127, True), (0, 15, False), (-8, 7, True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def ranged(method: str, x, grid, **options) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = range_method(method, **options)
    for batch in x.split(7_000):
        chosen.observe(batch)
    return chosen.range(*grid)


def numbers(clips) -> list[float]:
    return [end.item() for end in clips]


def symmetric(low: float, high: float, grid) -> list[float]:
    scale = max(high / grid[1], low / grid[0])
    return [grid[0] * scale, grid[1] * scale]


@every_sample
@every_grid
@pytest.mark.parametrize("percentile", [1.0, 0.9995, 0.9, 0.6])
def test_percentile_is_the_kth_value(name, grid, percentile) -> None:
    x = np.sort(SAMPLES[name].double().numpy())
    k = max(1, x.size - int(percentile * x.size))
    low, high = min(x[k - 1], 0.0), max(x[-k], 0.0)
    want = symmetric(low, high, grid) if grid[2] else [low, high]
    # Exact while the list of extreme values holds it, else within a bin.
    slack = 1e-6 * np.abs(x).max() if k <= 128 else (x[-1] - x[0]) / 500 + np.abs(x).max() * 2e-6
    assert numbers(ranged("percentile", SAMPLES[name], grid, percentile=percentile)) == pytest.approx(
        want, abs=float(slack)
    )


@every_sample
@every_grid
def test_min_max_and_averages(name, grid) -> None:
    x = SAMPLES[name]
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    want = symmetric(low, high, grid) if grid[2] else [low, high]
    assert numbers(ranged("min_max", x, grid)) == pytest.approx(want, rel=1e-6)
    low, high = x[:7_000].min().item(), x[:7_000].max().item()
    for batch in x.split(7_000)[1:]:
        low, high = low + 0.25 * (batch.min().item() - low), high + 0.25 * (batch.max().item() - high)
    low, high = min(low, 0.0), max(high, 0.0)
    want = symmetric(low, high, grid) if grid[2] else [low, high]
    assert numbers(ranged("moving_average", x, grid, averaging=0.25)) == pytest.approx(want, rel=1e-5)


@every_sample
@every_grid
def test_mse_is_as_good_as_trying_everything(name, grid) -> None:
    x = SAMPLES[name]
    got = true_error(x, ranged("mse", x, grid), *grid)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    parts = torch.linspace(0.02, 1, 50)
    if grid[2]:
        extreme = torch.maximum(-low, high)
        tried = [(-extreme * part, extreme * part) for part in parts]
    else:
        downs, ups = (parts if low < 0 else parts[-1:], parts if high > 0 else parts[-1:])
        tried = [(low * down, high * up) for down in downs[::3] for up in ups[::3]]
    best = min(true_error(x, clips, *grid) for clips in tried)
    # Data so far from 0 that it lies in few cells: what counts is where the cells' middles fall.
    assert got <= best * 1.02 + 1e-12 or name in ("constant", "far from 0")
    assert got <= true_error(x, (low, high), *grid) * 1.02 + 1e-9


@every_sample
@every_grid
def test_ifmr_keeps_the_best_of_its_candidates(name, grid) -> None:
    x = SAMPLES[name]
    ordered = np.sort(x.double().numpy())
    k = ordered.size - int(0.999 * ordered.size)
    low, high = min(ordered[k - 1], 0.0), max(ordered[-k], 0.0)
    ratios = np.arange(0.7, 1.3 - 1e-9, 0.02)
    candidates = [symmetric(low * r, high * r, grid) if grid[2] else [low, high * r] for r in ratios]
    options = {"max_percentile": 0.999, "min_percentile": 0.999, "search_step": 0.02}
    got = ranged("ifmr", x, grid, **options)
    assert min(np.abs(np.array(c) - numbers(got)).max() for c in candidates) <= 1e-5 * np.abs(ordered).max()
    errors = [true_error(x, tuple(torch.tensor(end, dtype=torch.float32) for end in c), *grid) for c in candidates]
    assert true_error(x, got, *grid) <= min(errors) * 1.02 + np.ptp(ordered) ** 2 * 1e-7


def hfmg_loss(edges, counts, left: int, right: int, num_cells: int) -> float:
    """The integral of a range of bins, cut where the nearest centre changes."""
    low, high = edges[left], edges[right + 1]
    cell = (high - low) / num_cells
    centres = low + cell * (np.arange(num_cells) + 0.5)
    total = 0.0
    for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count == 0 or a == b:
            continue
        cuts = np.unique(np.clip([a, *(low + cell * np.arange(1, num_cells)), b], a, b))
        for c, d in itertools.pairwise(cuts):
            centre = centres[np.abs(centres - (c + d) / 2).argmin()]
            total += count / (b - a) * ((d - centre) ** 3 - (c - centre) ** 3) / 3
    return total


@pytest.mark.parametrize("num_points", [16, 300], ids=["fewer points than bins", "more"])
def test_the_integral_is_that_of_its_definition(num_points) -> None:
    random = np.random.default_rng(0)
    edges, counts = np.sort(random.normal(size=101)), random.integers(0, 9, 100)
    for left, right in ((0, 99), (20, 90), (45, 46)):
        low, high = edges[left], edges[right + 1]
        cell = torch.tensor([(high - low) / num_points])
        got = quantization_errors(torch.tensor(edges), torch.tensor(counts), low + cell / 2, cell, num_points)
        assert got.item() == pytest.approx(hfmg_loss(edges, counts, left, right, num_points), rel=1e-7)


def test_hfmg_takes_the_best_of_its_path() -> None:
    method = range_method("hfmg", bins=1024)
    method.observe(SAMPLES["normal"])
    edges, counts = (part.numpy() for part in method.histogram.edges())
    path = hfmg.search_path(counts)
    assert path[0] == (0, counts.size - 1)
    assert path[-1][1] - path[-1][0] <= -(-counts.size // 4)
    tried = path[:: max(1, len(path) // 12)]
    low, high = numbers(method.range(0, 15))
    chosen = (int(np.abs(edges - low).argmin()), int(np.abs(edges - high).argmin()) - 1)
    assert chosen in path
    best = hfmg_loss(edges, counts, *chosen, 16)
    assert best <= min(hfmg_loss(edges, counts, *pair, 16) for pair in tried) * (1 + 1e-9)


@every_sample
def test_entropy_cuts_outliers_and_keeps_what_is_even(name) -> None:
    x = SAMPLES[name]
    low, high = numbers(ranged("entropy", x, (-128, 127, True)))
    extreme = x.abs().max().item()
    assert max(-low, high) <= extreme * 129 / 127
    if name == "outlier":
        assert high < 10
    if name in ("uniform", "constant", "below 0", "far from 0"):
        assert high >= extreme * 0.98


@pytest.mark.parametrize("grid", [(0, 255), (-1, 2), (-32768, 32767)], ids=str)
@given(seed=st.integers(0, 10**6), low=st.floats(-3, 0), high=st.floats(0.1, 5))
def test_error_of_grids_against_samples_of_the_histogram(grid, seed, low, high) -> None:
    edges = torch.linspace(-1, 2, 41, dtype=torch.float64)
    counts = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(seed))
    ends = (torch.tensor([float(end)], dtype=torch.float64) for end in (low, high))
    first, step = integer_grid(*ends, grid[1] - grid[0] + 1)
    got = quantization_errors(edges, counts, first, step, grid[1] - grid[0] + 1).item()
    inside = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
    x = edges[:-1, None] + edges.diff()[:, None] * inside
    nearest = first + ((x - first) / step).round().clamp(0, grid[1] - grid[0]) * step
    want = ((x - nearest).square().mean(1) * counts).sum().item()
    assert got == pytest.approx(want, rel=2e-2, abs=1e-12)
