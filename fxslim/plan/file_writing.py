# SPDX-License-Identifier: Apache-2.0
"""Writes a file whole or not at all."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from fxslim.errors import CheckpointError


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    After an error there is no new file, and one that was there before is as it was.
    """
    path = Path(path)
    temporary = path.parent / (path.name + ".part")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written: {type(error).__name__}: {error}; "
            "give the name of a file in a folder that exists and can be written to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
