# SPDX-License-Identifier: Apache-2.0
"""Where exported files are made: beside their place, under a temporary name, until they are known to be right."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxslim.errors import ExportError


@contextlib.contextmanager
def in_place(path: str | Path) -> Iterator[Path]:
    """Give a path of the same name in a temporary folder; what was written there moves to ``path`` at the end.

    After an error nothing new is there, and what was there before is as it was.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder: give the name of a file, such as {path / 'model.onnx'}")
        folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {type(error).__name__}: {error}; give a file in a folder that exists and can be "
            "written to"
        ) from error
    try:
        yield Path(folder) / path.name
        move_files(Path(folder), path)
    except OSError as error:
        raise ExportError(f"{path} can't be written: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_files(folder: Path, path: Path) -> None:
    """All files of a folder beside ``path``; the one of its name last."""
    for one in sorted(folder.iterdir(), key=lambda one: one.name == path.name):
        one.replace(path.parent / one.name)


def kept_aside(made: Path) -> Path:
    """Move a file that is wrong out of its temporary folder; returns where it is now."""
    aside = made.parent.parent / f"{made.stem}.disagrees{made.suffix}"
    for one in made.parent.iterdir():
        one.replace(aside if one == made else made.parent.parent / one.name)
    return aside
