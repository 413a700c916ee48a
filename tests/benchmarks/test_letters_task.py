# SPDX-License-Identifier: Apache-2.0
"""The task that ranks ways of pruning: the same images everywhere, balanced, no two classes alike; its statistics."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxslim
from benchmarks.tasks import contest
from benchmarks.tasks.candidates import our_candidate
from benchmarks.tasks.compare import row
from benchmarks.tasks.contest import Contest, Score, Settings
from benchmarks.tasks.glyphs import BLOCK, CLASSES, LETTERS, letter_images
from benchmarks.tasks.networks import NETWORKS
from benchmarks.tasks.paired_intervals import paired_interval
from benchmarks.tasks.remembering import Memory, model_digest
from benchmarks.tasks.torch_pruning_rows import rival_candidates
from benchmarks.tasks.training import Pictures, Recipe, accuracy, reestimate_norms, train


def test_the_same_seed_gives_the_same_bytes() -> None:
    images, labels = letter_images(300, seed=7)
    assert images.shape == (300, 3, 32, 32)
    assert images.dtype == np.uint8
    found = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()[:16]
    assert found == "8ebc43710d02677c"


def test_a_longer_set_begins_with_the_shorter_and_seeds_differ() -> None:
    images, labels = letter_images(600, seed=7)
    fewer, fewer_labels = letter_images(300, seed=7)
    assert np.array_equal(images[:300], fewer)
    assert np.array_equal(labels[:300], fewer_labels)
    other, _ = letter_images(300, seed=8)
    assert (other != fewer).mean() > 0.9


def test_classes_are_balanced() -> None:
    _, labels = letter_images(4 * BLOCK, seed=3)
    assert np.bincount(labels, minlength=len(CLASSES)).tolist() == [4 * BLOCK // len(CLASSES)] * len(CLASSES)


def test_no_two_letters_have_the_same_strokes() -> None:
    drawn = [frozenset(frozenset(stroke) for stroke in strokes.split()) for strokes in LETTERS.values()]
    assert len(set(drawn)) == len(CLASSES) >= 12


def test_no_two_classes_look_alike() -> None:
    """The mean picture of a letter's contrast is nearer to that of other images of it than to any other letter's."""
    images, labels = letter_images(8192, seed=5)
    grey = images.astype(np.float64).mean(1)
    contrast = np.abs(grey - np.median(grey, axis=(1, 2), keepdims=True))
    halves = [
        np.stack([contrast[half][labels[half] == label].mean(0) for label in range(len(CLASSES))])
        for half in (slice(0, 4096), slice(4096, None))
    ]
    first, second = ((half - half.mean(0)).reshape(len(CLASSES), -1) for half in halves)
    assert (np.linalg.norm(first[:, None] - second[None], axis=2).argmin(1) == np.arange(len(CLASSES))).all()


def test_intervals_are_students_for_paired_differences() -> None:
    found = paired_interval([91.0, 92.0, 93.5], [90.0, 91.5, 91.5])
    # Differences 1, 0.5, 2: mean 7/6, deviations -1/6, -4/6, 5/6, variance (1 + 16 + 25) / 36 / 2.
    assert found.mean == pytest.approx(7 / 6)
    assert found.half == pytest.approx(4.303 * math.sqrt(42 / 72) / math.sqrt(3))
    assert not found.clear
    assert str(found) == "+1.17 ± 1.90"
    assert str(paired_interval([91.0, 92.0, 93.0], [90.0, 91.1, 91.9])) == "+1.00 ± 0.25*"
    assert str(paired_interval([90.0], [91.5])) == "-1.50"


def test_a_row_shows_means_and_differences() -> None:
    def score(value: float) -> Score:
        return Score(macs=0.5, right_after=value, repaired=value + 1, fine_tuned=value + 2)

    base, other = [score(60.0), score(62.0)], [score(61.0), score(63.0)]
    assert row("l2", base, base) == "| l2 | 0.500 | 61.00 |  | 62.00 |  | 63.00 |  |  |"
    assert row("l1", other, base).startswith("| l1 | 0.500 | 62.00 | +1.00 ± 0.00* | 63.00 |")
    assert "not run: no such layer" in row("bn", "no such layer", base)


@pytest.mark.parametrize("net", NETWORKS)
def test_the_networks_lose_half_their_macs_and_stay_equal(net: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[net]()
    pictures = Pictures.made(BLOCK, seed=1)
    reestimate_norms(model, pictures.batches(BLOCK))
    images, _ = pictures.batch(slice(0, 4))
    plan = fxslim.plan_pruning(model, images, ratio=0.5)
    assert abs(plan.macs[1] / plan.macs[0] - 0.5) < 0.03
    assert plan.verify(model, images).ok


def test_norms_are_the_mean_over_the_batches_and_weights_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.named_parameters()}
    batches = Pictures.made(200, seed=1).batches(200, size=100)
    reestimate_norms(model, batches)
    with torch.no_grad():
        means = torch.stack([model[0](images).mean((0, 2, 3)) for images, _ in batches]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-5)
    assert model[1].momentum == 0.1
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_training_is_repeatable_and_learns() -> None:
    pictures = Pictures.made(BLOCK, seed=1)
    digests, found = [], []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16))
        train(model, pictures, Recipe(epochs=8, rate=1e-3, batch=64), seed=3)
        digests.append(model_digest(model))
        found.append(accuracy(model, pictures))
    assert digests[0] == digests[1]
    assert found[0] > 40


def test_a_rerun_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contest.RECIPES, "resnet", Recipe(epochs=1, rate=1e-3))
    settings = Settings(calibration=100, epochs=0.5)
    first = Contest(Memory(tmp_path), settings, 2 * BLOCK, BLOCK).score("l2", "resnet", 0)
    assert 0.45 < first.macs < 0.53

    def refuse(*_: object) -> float:
        raise AssertionError("measured again")

    for name in ("train", "accuracy"):
        monkeypatch.setattr(contest, name, refuse)
    assert Contest(Memory(tmp_path), settings, 2 * BLOCK, BLOCK).score("l2", "resnet", 0) == first


def test_a_repair_changes_weights_and_not_shapes() -> None:
    torch.manual_seed(0)
    model = NETWORKS["resnet"]().eval()
    batches = Pictures.made(128, seed=1).batches(128)
    found = our_candidate("l2+least_squares", model, contest.EXAMPLE, batches, ratio=0.5)
    assert found.mended is not None
    before, after = found.model.state_dict(), found.mended.state_dict()
    assert {name: state.shape for name, state in before.items()} == {name: s.shape for name, s in after.items()}
    assert model_digest(found.model) != model_digest(found.mended)


def test_torch_pruning_comes_to_the_same_macs() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = NETWORKS["resnet"]().eval()
    batches = Pictures.made(64, seed=1).batches(64)
    whole = fxslim.trace(model, contest.EXAMPLE).cost.macs
    found = rival_candidates("tp:taylor", model, contest.EXAMPLE, batches, whole // 2)
    assert [candidate.settings for candidate in found] == ["global", "layer"]
    for candidate in found:
        assert candidate.macs == fxslim.trace(candidate.model, contest.EXAMPLE).cost.macs
        assert -0.01 <= candidate.macs / (whole // 2) - 1 <= 0.03


def test_torch_prunings_hessian_counts_the_last_image_only() -> None:
    importance = pytest.importorskip("torch_pruning").importance.HessianImportance()
    model = nn.Linear(2, 2, bias=False)
    for image in (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])):
        model.zero_grad()
        model(image).sum().backward()
        importance.accumulate_grad(model)
    [(parameter, total)] = importance._accu_grad.items()
    assert torch.equal(total, torch.tensor([[1.0, 4.0], [1.0, 4.0]]))
    assert importance._counter[parameter] == 1
