# SPDX-License-Identifier: Apache-2.0
"""Sums of products stay below the limit: by channel where entries are too many, in several passes over the data."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.pruning.repair import listening, refitting
from fxslim.pruning.repair.settings import INPUTS
from tests.pruning.repair.oracles import IMAGES, by_row, deep, design, error, least_squares, pruned, read_and_returned


class Counted:
    """Batches that know how often they were read."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(self.batches)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each sum of products."""
    found, add = [], refitting.add_products

    def adding(*args: Tensor) -> Tensor:
        result = add(*args)
        found.append(result.nbytes)
        return result

    monkeypatch.setattr(refitting, "add_products", adding)
    return found


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_small_limit_fits_by_channel_within_it_and_still_mends(inputs: str, sizes: list[int]) -> None:
    model, limit = deep(), 8_000
    plan = fxslim.plan_pruning(
        model, IMAGES[0], ratio=0.6, repair=least_squares(inputs, limit_bytes=limit), data=IMAGES
    )
    assert any("2: fitted by channel" in note and "of 8,000" in note for note in plan.notes), plan.notes
    assert any("8: fitted by channel" in note for note in plan.notes)
    repaired = plan.apply(deep())
    assert 0 < max(sizes) <= limit
    plain, best = (
        error(pruned(model, IMAGES[0], r, IMAGES, ratio=0.6), model, IMAGES) for r in (None, least_squares())
    )
    assert best < error(repaired, model, IMAGES) < plain


def test_by_channel_is_the_best_prediction_of_lost_channels_from_kept_ones() -> None:
    """Without a border each channel is read alike at each tap, up to which of them were drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"))
    model, batches = model.double(), [torch.randn(400, 3, 5, 5).double()]
    zeros = nn.Sequential(*model[:2], nn.Conv2d(6, 4, 3, padding=1)).double()
    plan = fxslim.plan_pruning(zeros, batches[0], target="channels", repair=least_squares(limit_bytes=1000))
    kept = next(list(cut.keep) for cut in plan.cuts if cut.name == "2.weight" and cut.dim == 1)
    x = model[:2](batches[0]).movedim(1, -1).reshape(-1, 6).detach()
    ones = torch.cat([x[:, kept], x.new_ones(len(x), 1)], 1)
    by_kept = torch.linalg.lstsq(ones, x).solution
    weight = torch.einsum("ockl,sc->oskl", model[2].weight, by_kept).detach()
    bias = model[2].bias.detach() + weight[:, -1].sum((1, 2))
    repaired = plan.apply(model, data=batches)
    torch.testing.assert_close(repaired[2].weight.detach(), weight[:, :-1], rtol=0, atol=0.02)
    torch.testing.assert_close(repaired[2].bias.detach(), bias, rtol=0, atol=0.05)


def test_many_layers_take_several_passes_and_the_result_is_the_same() -> None:
    model = deep()
    few, many = Counted(IMAGES), Counted(IMAGES)
    whole = pruned(model, IMAGES[0], least_squares("original"), few)
    parts = pruned(model, IMAGES[0], least_squares("original", limit_bytes=8 * 73**2), many)
    assert few.passes == 1
    assert many.passes == 3
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_layer_beyond_every_limit_is_left_and_told() -> None:
    model = deep()
    plan = fxslim.plan_pruning(model, IMAGES[0], ratio=0.6, repair=least_squares(limit_bytes=10), data=IMAGES)
    assert any("5: its sums take" in note and "limit_bytes is 10" in note for note in plan.notes)
    plain = pruned(model, IMAGES[0], None, None, ratio=0.6)
    for a, b in zip(plan.apply(deep()).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_pixels_of_a_flattened_channel_are_fitted_alike() -> None:
    """Each pixel is predicted by the same factors from the pixel at its place in the kept channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Flatten(), nn.Linear(32, 3)).double()
    batches = [torch.randn(200, 2, 2, 2).double()]
    # Three channels say all of the eight: two inputs and a constant.
    repaired = pruned(model, batches[0], least_squares(limit_bytes=2000), batches, target="channels")
    assert repaired[2].in_features == 16
    assert error(repaired, model, batches) < 1e-6


def test_rows_are_what_torchs_own_convolution_reads() -> None:
    """The design that oracles use, and the rows that are sampled, are made in different ways."""
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    x = torch.randn(3, 4, 7, 8)
    result = layer(x)
    places = torch.arange(result[:, 0].numel())
    rows = listening.rows_read(layer, x, listening.output_shape(layer, result), places, 1)
    torch.testing.assert_close(rows, design(layer, x), rtol=0, atol=0)
    torch.testing.assert_close(listening.outputs_at(layer, result, places), by_row(layer, result), rtol=0, atol=0)
    alone = listening.rows_read(layer, x[0], listening.output_shape(layer, result[0]), places[: len(places) // 3], 1)
    torch.testing.assert_close(alone, rows[:, : len(places) // 3], rtol=0, atol=0)
    assert read_and_returned(nn.Sequential(layer), "0", [x])[1].shape == (len(places), 6)
