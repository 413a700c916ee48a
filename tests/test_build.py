# SPDX-License-Identifier: Apache-2.0
"""The build: what can't be built is left out in auto mode and an error when asked for; an sdist is complete."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"CXX": "/nonexistent/g++"}, "/nonexistent/g++ can't be run"),
        ({"CXX": "false -x"}, "false failed"),
    ],
)
def test_auto_leaves_out_what_fails(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    result = build(tmp_path, FXSLIM_EXT="auto", CUDA_HOME=str(tmp_path), PATH=os.environ["PATH"], **environment)
    assert result.returncode == 0, result.stderr
    assert f"cpu: not built, the reference in Python is used: {reason}" in result.stderr
    assert not (tmp_path / "fxslim_ext/fxslim_cpu.so").exists()


def test_what_is_asked_for_must_be_built(tmp_path: Path) -> None:
    result = build(tmp_path, FXSLIM_EXT="cpu", CXX="/nonexistent/g++")
    assert result.returncode != 0
    assert "fxslim kernels for cpu: /nonexistent/g++ can't be run" in result.stderr


def test_unknown_choice(tmp_path: Path) -> None:
    assert "FXSLIM_EXT='gpu' must be auto, cpu, cuda or off" in build(tmp_path, FXSLIM_EXT="gpu").stderr


def test_source_archive_has_the_sources(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "FXSLIM_EXT": "off"})
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "fxslim_ext/csrc").rglob("*") if p.is_file()}
    assert sources <= names
    assert "fxslim/kernels/native.py" in names
