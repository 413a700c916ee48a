# SPDX-License-Identifier: Apache-2.0
"""The family of errors, and the hint for a misspelt name."""

import pytest

import fxslim
from fxslim.errors import unknown_name


@pytest.mark.parametrize(
    "name, builtin",
    [
        ("ConfigError", ValueError),
        ("PlanError", ValueError),
        ("DtypeError", TypeError),
        ("UnsupportedLayerError", TypeError),
        ("TraceError", RuntimeError),
        ("CalibrationError", RuntimeError),
        ("ExportError", RuntimeError),
        ("CheckpointError", RuntimeError),
    ],
)
def test_every_error_is_an_fxslim_error_and_a_builtin(name: str, builtin: type) -> None:
    kind = getattr(fxslim, name)
    assert issubclass(kind, fxslim.FxslimError)
    assert issubclass(kind, builtin)


def test_unknown_name_without_anything_near() -> None:
    assert unknown_name("layer", "xyz", ["conv1"]) == "unknown layer 'xyz' (known: conv1)"
