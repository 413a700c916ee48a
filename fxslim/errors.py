# SPDX-License-Identifier: Apache-2.0
"""What fxslim raises. Every class is an ``FxslimError`` and the builtin that a caller would expect."""

import difflib
from collections.abc import Iterable


class FxslimError(Exception):
    """Base of everything that fxslim raises for its users."""


class ConfigError(FxslimError, ValueError):
    """An argument or a configuration value is wrong; the message names it and its value."""


class DtypeError(FxslimError, TypeError):
    """An argument has a type or a dtype that the function does not take."""


class PlanError(FxslimError, ValueError):
    """A plan can't be made, or does not fit the model that it is applied to."""


class UnsupportedLayerError(FxslimError, TypeError):
    """A layer that was named, or that is in the way, can't be handled."""


class TraceError(FxslimError, RuntimeError):
    """The model could not be recorded with the inputs given."""


class CalibrationError(FxslimError, RuntimeError):
    """Observed data is missing, incomplete or not finite."""


class ExportError(FxslimError, RuntimeError):
    """A model could not be written to, or does not agree with, another format."""


class CheckpointError(FxslimError, RuntimeError):
    """A file is damaged, foreign, or belongs to another model."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Text for a name that does not exist, with the nearest ones that do.

    >>> unknown_name("schedule", "cosin", ["linear", "cosine"])
    "unknown schedule 'cosin'; did you mean 'cosine'? (known: cosine, linear)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"unknown {kind} {name!r}{hint} (known: {shown})"
