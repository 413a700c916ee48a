# SPDX-License-Identifier: Apache-2.0
"""Writes several ONNX models together: all of them arrive, or nothing does."""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxslim.errors import ExportError

_log = logging.getLogger(__name__)

# A protobuf message ends at 2 GiB; names and nodes need some room of it.
LARGEST_BYTES = 2**31 - 2**24
SMALLEST_EXTERNAL_BYTES = 1024


def save_models(models: Mapping[Path, tuple[Any, str]]) -> None:
    """``{path: (model, suffix)}``. A model too large for one file keeps each large tensor in
    ``<tensor>_<suffix>.external`` beside it; the models given are emptied of those tensors."""
    folder = next(iter(models)).parent
    made = _make_folder(folder)
    arrived: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
            for path, (model, suffix) in models.items():
                _write(model, Path(unfinished) / path.name, suffix)
            for part in sorted(Path(unfinished).iterdir(), key=lambda p: p.suffix == ".onnx"):
                _move(part, folder / part.name, arrived)
    except BaseException as error:
        for path in arrived:
            path.unlink(missing_ok=True)
        for made_folder in made:
            made_folder.rmdir()
        if isinstance(error, OSError):
            raise ExportError(f"{folder} can't be written: {error}; nothing was left there") from error
        raise


def _make_folder(folder: Path) -> list[Path]:
    """Folders that had to be made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for path in missing:
            if path.is_dir():
                path.rmdir()
        raise ExportError(f"the folder {folder} can't be made: {error}") from error
    return missing


def _move(part: Path, path: Path, arrived: list[Path]) -> None:
    if path.exists():
        _log.warning("%s is overwritten", path)
    else:
        arrived.append(path)
    part.replace(path)


def _write(model: Any, path: Path, suffix: str) -> None:
    if _is_too_large(model):
        _move_tensors_out(model, path.parent, suffix)
    path.write_bytes(model.SerializeToString())


def _is_too_large(model: Any) -> bool:
    # Beyond the limit a message can fail to tell its size, so the tensors are counted first.
    tensors = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    return tensors > LARGEST_BYTES or model.ByteSize() > LARGEST_BYTES


def _move_tensors_out(model: Any, folder: Path, suffix: str) -> None:
    taken: set[str] = set()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < SMALLEST_EXTERNAL_BYTES:
            continue
        stem = re.sub(r"[^\w.-]", "_", tensor.name)
        while f"{stem}_{suffix}.external" in taken:
            stem += "_"
        location = f"{stem}_{suffix}.external"
        taken.add(location)
        (folder / location).write_bytes(tensor.raw_data)
        entries = {"location": location, "offset": "0", "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = type(tensor).EXTERNAL
