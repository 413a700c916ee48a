# SPDX-License-Identifier: Apache-2.0
"""Patterns by name, and from plain data."""

import re
from collections.abc import Mapping
from typing import Any

from fxslim.errors import ConfigError, unknown_name
from fxslim.patterns.blocks import Block
from fxslim.patterns.n_of_m import NM
from fxslim.patterns.pattern import Pattern
from fxslim.patterns.unstructured import Unstructured

_KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (NM, Block, Unstructured)}
_EXAMPLES = ("2:4", "1:4", "4:8", "cin32cout64", "cin32cout32", "unstructured")


def as_pattern(pattern: Any) -> Pattern:
    """A pattern, or the one that a name means: "n:m", "cin<in>cout<out>", "unstructured".

    >>> as_pattern("2:4"), as_pattern("cin32cout64")
    (NM(n=2, m=4, axis=1), Block(cin=32, cout=64, per_position=True, ratio=None))
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern must be a name such as '2:4', or NM, Block, Unstructured; got {pattern!r}")
    text = pattern.strip().lower()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"cin(\d+)cout(\d+)", text):
        return Block(cin=int(found[1]), cout=int(found[2]))
    if text == "unstructured":
        return Unstructured()
    raise ConfigError(unknown_name("pattern", pattern, _EXAMPLES))


def pattern_from_dict(data: Mapping[str, Any]) -> Pattern:
    """The pattern that ``to_dict`` wrote.

    >>> pattern_from_dict({"kind": "n:m", "n": 1, "m": 4})
    NM(n=1, m=4, axis=1)
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"a pattern as plain data is a dict with 'kind', got {data!r}")
    settings = dict(data)
    kind = str(settings.pop("kind", ""))
    if kind not in _KINDS:
        raise ConfigError(unknown_name("kind of pattern", kind, _KINDS))
    try:
        return _KINDS[kind](**settings)
    except TypeError as error:
        raise ConfigError(f"pattern {kind!r}: {error}") from error
