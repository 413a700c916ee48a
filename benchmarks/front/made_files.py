# SPDX-License-Identifier: Apache-2.0
"""Makes the files of a cell and tests them; what was made in an earlier run is read instead."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxslim
from benchmarks.front.cells import Cell, Row
from benchmarks.front.places import Place
from benchmarks.models.onnx_operators import session
from benchmarks.tasks.contest import EXAMPLE
from benchmarks.tasks.networks import NETWORKS
from fxslim.plan.file_writing import write_file

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A row on one training: its file and how right it is (in percent), or why there is none."""

    row: str
    file: str = ""
    accuracy: float = 0.0
    bytes: int = 0
    error: str = ""
    # Its part of what the cell took.
    seconds: float = 0.0


def open_file(path: Path, network: str) -> Run:
    """What the file computes, on one thread: ONNX Runtime's for .onnx, torch's else."""
    if path.suffix == ".onnx":
        runner = session(path)
        return lambda images: torch.from_numpy(np.asarray(runner.run(None, {"x": images.numpy()})[0]))
    if path.suffix == ".pt":
        model: Any = torch.jit.load(path)
    else:
        model = fxslim.load(NETWORKS[network](), path).eval()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def made_by(cell: Cell, place: Place) -> list[Made]:
    """All rows of the cell; a row that fails says why, the others are made."""
    kept = place.folder / f"{_plain(cell.name)}.json"
    if kept.exists():
        return [Made(**one) for one in json.loads(kept.read_text())]
    place.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        torch.manual_seed(place.seed)
        model = cell.prepare(place)
        if cell.trains:
            model = place.trained(model, fxslim.trace(model, EXAMPLE).cost.macs if cell.lighter else place.macs)
        model.eval()
    except ModuleNotFoundError as missing:
        # Another run may find it.
        return [Made(row=row.name, error=f"not run: {missing}") for row in cell.rows]
    except Exception as error:
        found = [Made(row=row.name, error=_reason(error)) for row in cell.rows]
    else:
        found = [_row_made(row, place, model) for row in cell.rows]
    seconds = time.perf_counter() - start
    found = [replace(one, seconds=seconds / len(found)) for one in found]
    write_file(kept, lambda temporary: temporary.write_text(json.dumps([asdict(one) for one in found])))
    _tell(place, found, seconds)
    return found


def _row_made(row: Row, place: Place, model: nn.Module) -> Made:
    try:
        path = row.write(place, model, place.folder / _plain(row.name))
        right = _accuracy(open_file(path, place.name), place)
    except Exception as error:
        return Made(row=row.name, error=_reason(error))
    return Made(row=row.name, file=path.name, accuracy=right, bytes=path.stat().st_size)


def _accuracy(run: Run, place: Place, size: int = 250) -> float:
    """In percent of all unseen images."""
    right, count = 0, len(place.contest.unseen.labels)
    for images, labels in place.contest.unseen.batches(count, size):
        logits = run(images)
        if not bool(torch.isfinite(logits).all()):
            raise fxslim.FxslimError("diverged: its logits are not finite")
        right += int((logits.argmax(1) == labels).sum())
    return 100 * right / count


def _plain(name: str) -> str:
    """As a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _tell(place: Place, found: list[Made], seconds: float) -> None:
    shown = "; ".join(f"{one.row} {one.error or f'{one.accuracy:.2f}'}" for one in found)
    print(f"{place.net} {place.seed}: {shown} ({seconds:.0f} s)", flush=True)
