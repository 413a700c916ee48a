# SPDX-License-Identifier: Apache-2.0
"""A progress bar is seen on a terminal only, and never changes what is iterated."""

import io
import sys

import pytest

from fxslim.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "progress, stream, shown", [(True, Terminal, True), (False, Terminal, False), (True, io.StringIO, False)]
)
def test_bar(monkeypatch, progress: bool, stream: type, shown: bool) -> None:
    error = stream()
    monkeypatch.setattr(sys, "stderr", error)
    assert list(track(range(5), "counting", progress=progress)) == [0, 1, 2, 3, 4]
    assert ("counting" in error.getvalue()) == shown
