# SPDX-License-Identifier: Apache-2.0
"""The doctor tells the truth about kernels, whatever is attached."""

import os
import subprocess
import sys

import pytest

from fxslim.cli.main import main
from fxslim.kernels import operator_names


def run_doctor(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fxslim", "doctor"], env={**os.environ, **environment}, capture_output=True, text=True
    )


def kinds(text: str, op_name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [op_name]]
    return line.split()[1:]


def test_reference_is_said_with_its_reason() -> None:
    result = run_doctor(FXSLIM_KERNELS="reference")
    assert result.returncode == 0
    for name in operator_names():
        assert kinds(result.stdout, name) == ["reference", "reference"]
    assert "cpu reference: FXSLIM_KERNELS=reference" in result.stdout


def test_missing_library_is_said(tmp_path) -> None:
    result = run_doctor(FXSLIM_EXT_DIR=str(tmp_path), FXSLIM_KERNELS="auto")
    assert kinds(result.stdout, "nm_mask")[0] == "reference"
    assert f"{tmp_path}/fxslim_cpu.so was not built (see 'Building the kernels' in README.md)" in result.stdout


def test_damaged_library_is_a_warning_and_the_reference(tmp_path) -> None:
    (tmp_path / "fxslim_cpu.so").write_bytes(b"not a library")
    result = run_doctor(FXSLIM_EXT_DIR=str(tmp_path), FXSLIM_KERNELS="auto")
    assert kinds(result.stdout, "nm_mask")[0] == "reference"
    assert "fxslim_cpu.so does not load" in result.stdout
    assert "cpu kernels: reference, because" in result.stderr


def test_native_that_is_not_there_is_an_error(tmp_path) -> None:
    result = run_doctor(FXSLIM_EXT_DIR=str(tmp_path), FXSLIM_KERNELS="native")
    assert result.returncode != 0
    assert f"ConfigError: FXSLIM_KERNELS=native, but {tmp_path}/fxslim_cpu.so was not built" in result.stderr


def test_misspelt_choice_names_the_nearest() -> None:
    result = run_doctor(FXSLIM_KERNELS="referense")
    assert "unknown choice 'referense'; did you mean 'reference'?" in result.stderr


def test_unknown_command_exits_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["docter"])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_misspelt_instruction_set_is_an_error() -> None:
    assert "unknown instruction set 'avx'; did you mean" in run_doctor(FXSLIM_CPU="avx").stderr
