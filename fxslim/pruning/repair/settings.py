# SPDX-License-Identifier: Apache-2.0
"""What ``apply`` mends after a removal, and how."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxslim.errors import ConfigError, unknown_name

LEAST_SQUARES, BN = "least_squares", "bn"
STEPS = (LEAST_SQUARES, BN)
INPUTS = ("pruned", "original")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """``steps`` out of "least_squares" and "bn", always in this order.

    Least squares looks at ``num_positions`` places of each feature map (of a whole batch; drawn by ``seed``). It fits
    to what a layer reads in the ``"pruned"`` model, repaired so far, or in the ``"original"`` one, which takes fewer
    passes over the data. Its sums of products may take ``limit_bytes`` at a time; a layer that needs more is fitted by
    channel, alike at each position of its kernel.

    >>> as_repair("bn")
    Repair(steps=('bn',), inputs='pruned', num_positions=4096, limit_bytes=536870912, seed=0)
    """

    steps: tuple[str, ...]
    inputs: str = "pruned"
    num_positions: int = 4096
    limit_bytes: int = 512 << 20
    seed: int = 0


def as_repair(value: "str | Iterable[str] | Repair | None") -> Repair | None:
    """The argument ``repair``: a step, several, or all settings; checked."""
    if value is None:
        return None
    if not isinstance(value, Repair):
        value = Repair(steps=(value,) if isinstance(value, str) else tuple(value))
    if not value.steps:
        raise ConfigError(f"repair has no steps: name some of {', '.join(STEPS)}, or leave it out")
    for step in value.steps:
        if step not in STEPS:
            raise ConfigError("repair: " + unknown_name("step", str(step), STEPS))
    if value.inputs not in INPUTS:
        raise ConfigError("repair: " + unknown_name("inputs", str(value.inputs), INPUTS))
    for name, least in (("num_positions", 1), ("limit_bytes", 1), ("seed", 0)):
        number = getattr(value, name)
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ConfigError(f"repair: {name}={number!r} must be an integer of at least {least}")
    return value


def pack_repair(repair: Repair) -> dict[str, Any]:
    """The settings as plain data.

    >>> unpack_repair(pack_repair(Repair(steps=("bn",), seed=3))).seed
    3
    """
    return asdict(repair) | {"steps": list(repair.steps)}


def unpack_repair(data: Mapping[str, Any]) -> Repair:
    """The settings that ``pack_repair`` wrote."""
    unknown = data.keys() - {field.name for field in fields(Repair)}
    if unknown:
        raise ConfigError(f"repair: {min(unknown)} is no setting")
    repair = as_repair(Repair(**{**data, "steps": tuple(data["steps"])}))
    assert repair is not None
    return repair
