# SPDX-License-Identifier: Apache-2.0
"""The front: who is on it, what a cell leaves behind, what a process that dies takes with it, what is printed."""

import os
import random
import xml.etree.ElementTree as tree
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.front import cells, compressed_models, latencies, made_files, places
from benchmarks.front import run as front_run
from benchmarks.front.cells import CELLS, FLOAT, ROWS, TRAINED_ON, Cell, Row
from benchmarks.front.front_picture import picture
from benchmarks.front.front_report import section, summary
from benchmarks.front.latencies import Latency
from benchmarks.front.made_files import Made, made_by, open_file
from benchmarks.front.places import NETS, Place
from benchmarks.front.standings import AXES, SAME_TIME, Standing, best_within, front, reference, verdict
from benchmarks.front.workers import Died, Workers
from benchmarks.models.onnx_operators import in_float, in_integers, operators
from benchmarks.tasks.contest import Contest, Settings
from benchmarks.tasks.glyphs import BLOCK
from benchmarks.tasks.networks import NETWORKS
from benchmarks.tasks.remembering import Memory
from benchmarks.tasks.training import Pictures, Recipe, train

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
MAKERS = ("fxslim", "Torch-Pruning")


def standing(number: int, name: str, by: str, accuracies: list[float], faster: float, size: float) -> Standing:
    timed = tuple(Latency(milliseconds=1 / faster, faster=faster) for _ in range(2))
    return Standing(
        number=number, name=name, by=by, accuracies=tuple(accuracies),
        latencies=tuple(timed for _ in accuracies), bytes=size,
    )  # fmt: skip


@st.composite
def standings(draw) -> list[Standing]:
    numbers = st.integers(1, 12)
    found = [standing(1, FLOAT, "fxslim", [draw(numbers) + 80.0, draw(numbers) + 80.0], 1.0, 10.0)]
    for number in range(2, draw(st.integers(2, 9))):
        accuracies = [80.0 + draw(numbers), 80.0 + draw(numbers)]
        by = draw(st.sampled_from(MAKERS))
        found.append(standing(number, f"row {number}", by, accuracies, draw(numbers) / 2, draw(numbers)))
    return found


@given(standings(), st.sampled_from(list(AXES)))
def test_the_front_is_what_no_other_row_dominates(rows: list[Standing], axis: str) -> None:
    measure = AXES[axis]

    def dominated(one: Standing) -> bool:
        return any(
            (other.accuracy >= one.accuracy and measure(other) <= measure(one))
            and (other.accuracy > one.accuracy or measure(other) < measure(one))
            for other in rows
        )

    best = front(rows, measure)
    assert not any(dominated(one) for one in best)
    corners = {(one.accuracy, measure(one)) for one in best}
    assert all(dominated(one) or (one.accuracy, measure(one)) in corners for one in rows)


@given(standings(), st.sampled_from(list(AXES)), st.floats(0, 5))
def test_the_best_within_some_points_is_ours_and_among_the_smallest(
    rows: list[Standing], axis: str, points: float
) -> None:
    measure, best = AXES[axis], best_within(rows, points, AXES[axis])
    least = reference(rows).accuracy - points
    good = [one for one in rows if one.by == "fxslim" and one.accuracy >= least]
    smallest = min(measure(one) for one in good)
    equals = [one for one in good if measure(one) <= smallest * SAME_TIME]
    assert any(one is best for one in equals)
    assert best.accuracy == max(one.accuracy for one in equals)


def test_of_files_equally_fast_the_most_accurate_is_named() -> None:
    whole, better = standing(1, FLOAT, "fxslim", [90.0], 1.0, 100), standing(2, "better", "fxslim", [89.9], 4.0, 50)
    for faster, name in ((4.04, "better"), (4.4, "faster")):
        rows = [whole, better, standing(3, "faster", "fxslim", [89.2], faster, 50)]
        assert best_within(rows, 1.0, AXES["batch 1"]).name == name


def test_differences_are_from_the_better_float_network() -> None:
    rows = [standing(1, FLOAT, "fxslim", [90.0, 91.0], 1, 1), standing(2, TRAINED_ON, "fxslim", [91.0, 91.0], 1, 1)]
    assert reference(rows).name == TRAINED_ON
    assert reference(rows[:1]).name == FLOAT


def test_a_peer_is_judged_by_ours_of_the_same_size() -> None:
    rows = [
        standing(1, FLOAT, "fxslim", [90.0, 90.2, 90.1], 1.0, 100),
        standing(2, "small", "fxslim", [88.0, 88.1, 88.0], 4.0, 20),
        standing(3, "theirs", "Torch-Pruning", [89.0, 89.0, 89.1], 3.9, 30),
        standing(4, "tiny", "Torch-Pruning", [50.0, 50.0, 50.0], 9.0, 1),
    ]
    assert verdict(rows[2], rows, AXES["batch 1"]).endswith("**worse**")
    assert verdict(rows[2], rows, AXES["batch 1"]).startswith("small: -1.00")
    assert verdict(rows[3], rows, AXES["size"]) == "**none as small**"
    slower = standing(3, "theirs", "Torch-Pruning", [89.0, 89.0, 89.1], 0.9, 120)
    assert verdict(slower, rows, AXES["batch 1"]).endswith(", better")
    lines = summary({"net": rows})
    assert sum("theirs" in line for line in lines) == 3
    text = "\n".join(summary({"net": [*rows[:2], slower]}))
    assert "No file of another tool is better" in text
    assert "theirs" not in text


def test_a_row_that_failed_is_told_and_takes_no_part() -> None:
    rows = [
        standing(1, FLOAT, "fxslim", [90.0, 90.2], 1.0, 100),
        Standing(number=2, name="broken", by="fxslim", error="ValueError: no"),
        standing(3, "theirs", "Torch-Pruning", [89.0, 89.0], 3.9, 30),
    ]
    lines = section("resnet", rows)
    told = next(line for line in lines if "broken" in line)
    assert "failed: ValueError: no" in told
    assert {line.count("|") for line in lines if line.startswith(("| 1", "| 2", "| 3"))} == {14}
    drawn = picture({"resnet": rows})
    assert "broken" not in drawn


def test_the_picture_shows_every_row_in_both_panels() -> None:
    rows = [standing(n, f"row <{n}>", MAKERS[n % 2], [90.0 + n / 10, 90.0], n, 100 * n) for n in range(1, 7)]
    rows[0] = standing(1, FLOAT, "fxslim", [90.0, 90.0], 1, 100)
    root = tree.fromstring(picture({"resnet": rows, "vit": rows}))
    space = "{http://www.w3.org/2000/svg}"
    titles = [one.text for one in root.iter(f"{space}title")]
    assert titles.count("row <3>") == 4
    wide, high = float(root.get("width")), float(root.get("height"))
    for panel in root.iter(f"{space}g"):
        for point in panel.iter(f"{space}circle"):
            assert 0 < float(point.get("cx")) < wide / 2
            assert 0 < float(point.get("cy")) < high / 2


def twice(number: int, how: str) -> int:
    """What the processes of the next test do."""
    if how == "dies":
        os._exit(7)
    if how == "raises":
        raise ValueError(f"not {number}")
    return 2 * number


def test_a_process_that_dies_takes_only_its_own_task() -> None:
    workers = Workers(twice, jobs=2)
    tasks = [(number, "dies" if number == 2 else "raises" if number == 4 else "answers") for number in range(7)]
    for task in tasks[:5]:
        workers.put(*task)
    found = {}
    for task, answer in workers.answers():
        found[task] = answer
        if task[0] == 0:
            # More may be put while others are at work.
            for more in tasks[5:]:
                workers.put(*more)
    assert set(found) == set(tasks)
    assert isinstance(found.pop((2, "dies")), Died)
    error = found.pop((4, "raises"))
    assert isinstance(error, ValueError)
    assert str(error) == "not 4"
    assert found == {(number, "answers"): 2 * number for number in (0, 1, 3, 5, 6)}


def test_names_are_unique_as_names_of_files_too() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({made_files._plain(row.name) for row in ROWS}) == len(ROWS)
    assert len({made_files._plain(cell.name) for cell in CELLS}) == len(CELLS)
    assert {row.by for row in ROWS} == {"fxslim", "ONNX Runtime", "Torch-Pruning", "torch.ao", "torch"}
    assert [row.name for row in ROWS if row.name in (FLOAT, TRAINED_ON)] == [FLOAT, TRAINED_ON]
    assert set(NETS.values()) <= set(NETWORKS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A network that was hardly trained, at a budget of two steps."""
    folder = tmp_path_factory.mktemp("front")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(places.NETS, "resnet", "resnet")
        patch.setitem(places.RECIPES, "resnet", Recipe(epochs=4, rate=4e-3, batch=64))
        torch.set_num_threads(1)
        one = Contest(Memory(folder / "memory"), Settings(calibration=500), 4 * BLOCK, BLOCK)
        yield Place(one, "resnet", 0, folder / "resnet-0", steps=2)


def cell_of(name: str) -> Cell:
    return next(cell for cell in CELLS if cell.name == name)


def test_accuracies_are_those_of_the_files(place: Place) -> None:
    found = {one.row: one for one in made_by(cell_of(FLOAT), place)}
    assert not any(one.error for one in found.values())
    images, labels = next(iter(place.contest.unseen.batches(BLOCK, BLOCK)))
    for one in found.values():
        path = place.folder / one.file
        right = (open_file(path, "resnet")(images).argmax(1) == labels).double().mean()
        assert one.accuracy == pytest.approx(100 * float(right))
        assert one.bytes == path.stat().st_size
    with torch.no_grad():
        assert found[FLOAT].accuracy == pytest.approx(place.contest.accuracy(place.base), abs=0.5)


def test_a_second_run_reads_what_the_first_made(place: Place, monkeypatch) -> None:
    first = made_by(cell_of(FLOAT), place)
    monkeypatch.setattr(made_files, "_row_made", None)
    assert made_by(cell_of(FLOAT), place) == first


def test_a_row_that_fails_leaves_the_others(place: Place) -> None:
    def broken(place: Place, model: nn.Module, path: Path) -> Path:
        raise ValueError("no\nfile")

    rows = (Row(name="whole", by="fxslim", write=compressed_models.float_file),)
    cell = Cell(name="half broken", prepare=compressed_models.unchanged, trains=False,
                rows=(*rows, Row(name="not", by="fxslim", write=broken)))  # fmt: skip
    whole, failed = made_by(cell, place)
    assert whole.error == ""
    assert (failed.row, failed.file, failed.error) == ("not", "", "ValueError: no")
    assert failed.seconds > 0


def test_a_cell_that_cannot_be_prepared_is_told_for_each_row(place: Place) -> None:
    def diverging(place: Place) -> nn.Module:
        model = compressed_models.unchanged(place)
        model.get_submodule("head").weight.data.fill_(torch.nan)
        return model

    cell = Cell(
        name="diverges", prepare=diverging, rows=(Row(name="nan", by="torch", write=_plain_write),), trains=False
    )
    (failed,) = made_by(cell, place)
    assert "not finite" in failed.error
    missing = Cell(name="missing", prepare=_missing, rows=(Row(name="none", by="torch", write=_plain_write),))
    (told,) = made_by(missing, place)
    assert told.error.startswith("not run: No module named")
    assert not (place.folder / "missing.json").exists()


def _plain_write(place: Place, model: nn.Module, path: Path) -> Path:
    from benchmarks.front.peer_models import plain_float_file

    return plain_float_file(place, model, path)


def _missing(place: Place) -> nn.Module:
    raise ModuleNotFoundError("No module named 'torch_pruning'")


def test_lighter_networks_get_more_steps(place: Place, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(places, "train", lambda model, pictures, recipe, seed, teacher: taken.append(recipe) or model)
    place.trained(place.base, place.macs)
    place.trained(place.base, place.macs // 4)
    images = len(place.contest.pictures.labels)
    steps = [recipe.epochs * images / recipe.batch for recipe in taken]
    assert steps == pytest.approx([2, 8])
    assert [recipe.rate for recipe in taken] == [2e-3, 2e-3]


def test_a_student_learns_its_teacher() -> None:
    pictures = Pictures.made(2 * BLOCK, seed=1)
    teacher = torch.full((2 * BLOCK, 16), -3.0)
    teacher[:, 5] = 6.0
    torch.manual_seed(0)
    model = train(NETWORKS["resnet"](), pictures, Recipe(epochs=8, rate=1e-2), 0, teacher)
    with torch.no_grad():
        said = model(pictures.batch(slice(0, 64))[0])
    assert (said.argmax(1) == 5).all()
    assert torch.nn.functional.softmax(said / 2, 1)[:, 5].min() > 0.5


def test_latencies_are_kept_until_a_file_changes(place: Place, monkeypatch) -> None:
    rows = {one.row: place.folder / one.file for one in made_by(cell_of(FLOAT), place)}
    kept = place.folder / "some" / "latencies.json"
    kept.parent.mkdir()
    found = latencies.latencies(rows, "resnet", FLOAT, kept, rounds=2)
    assert set(found) == set(rows)
    assert [one.faster for one in found[FLOAT]] == [1.0, 1.0]
    assert all(one.milliseconds > 0 for some in found.values() for one in some)
    monkeypatch.setattr(latencies, "_take_turns", None)
    assert latencies.latencies(rows, "resnet", FLOAT, kept, rounds=2) == found
    with pytest.raises(TypeError):
        latencies.latencies(rows, "resnet", FLOAT, kept, rounds=3)


def test_results_of_all_trainings_become_one_row() -> None:
    names = [row.name for row in ROWS]
    generator = random.Random(0)
    found = []
    for _ in range(2):
        rows = {
            name: Made(row=name, file=f"{name}.onnx", accuracy=generator.uniform(80, 90), bytes=10) for name in names
        }
        timed = {name: [Latency(milliseconds=1.0, faster=1.0)] * 2 for name in names}
        found.append((rows, timed))
    found[1][0][names[3]] = Made(row=names[3], error="ValueError: no")
    rows = list(front_run._standings(found))
    assert [one.name for one in rows] == names
    assert rows[3].error == "ValueError: no"
    assert rows[0].accuracies == tuple(one[0][names[0]].accuracy for one in found)
    assert tuple(sorted(cells.PRUNED)) == cells.PRUNED


def test_int8_rows_multiply_in_integers(place: Place) -> None:
    made = {one.row: one for one in made_by(cell_of(FLOAT), place)}
    for name in ("float, quantize_static", "int8, calibrated"):
        found = operators(place.folder / made[name].file)
        assert in_float(found) == "none"
        assert in_integers(found) > 13
