# SPDX-License-Identifier: Apache-2.0
"""Which layers a chip's compiler makes sparse: the published rules of Tsingmicro's TX family."""

import re
from dataclasses import dataclass

from torch import nn

from fxslim.errors import ConfigError, unknown_name

_FAMILIES = {
    "TX5368": "8bit", "TX5339": "8bit", "TX5335": "8bit", "TX5336": "8bit or 16bit", "TX5256": "8bit or 16bit",
}  # fmt: skip
_WITHOUT = ("TX510", "TX5326", "TX5215", "TX5239", "TX5112")
_LARGEST_KERNEL = 8


@dataclass(frozen=True, kw_only=True)
class Eligibility:
    """Whether a chip makes a layer sparse, or the ``reason`` why not. ``cout``: filters that must agree."""

    ok: bool
    reason: str = ""
    cout: int = 64

    def __bool__(self) -> bool:
        return self.ok


def eligible(chip: str, layer: nn.Module, bits: int = 8) -> Eligibility:
    """Whether this chip skips zero blocks of this layer, by its compiler's published conditions.

    Whether that gains time the compiler decides for itself.

    >>> eligible("TX5368x", nn.Conv2d(64, 64, 3))
    Eligibility(ok=True, reason='', cout=64)
    >>> eligible("TX5336", nn.Conv2d(64, 64, 3, stride=4)).reason
    'stride_w is 4: TX5336 takes 1 and 2'
    """
    family = _family(chip)
    if family in _WITHOUT:
        return Eligibility(ok=False, reason=f"{family} has no weight sparsity")
    if isinstance(bits, bool) or bits not in (8, 16):
        raise ConfigError(f"bits={bits!r} must be 8 or 16")
    wide = _FAMILIES[family] != "8bit"
    cout = 32 if bits == 16 else 64
    if bits == 16 and not wide:
        return Eligibility(ok=False, reason=f"weights of 16 bits: {family} takes 8", cout=cout)
    reason = "" if isinstance(layer, nn.Linear) else _obstacle(family, layer, strided=wide)
    return Eligibility(ok=not reason, reason=reason, cout=cout)


def _family(chip: str) -> str:
    """The family that a chip's name begins with.

    >>> _family("TX5368x_TX5339x_TX5335x"), _family("tx5336")
    ('TX5368', 'TX5336')
    """
    found = re.match(r"TX\d+", str(chip).upper())
    name = found[0] if found else str(chip)
    known = [family for family in (*_FAMILIES, *_WITHOUT) if name.startswith(family)]
    if not known:
        raise ConfigError(unknown_name("chip", str(chip), (*_FAMILIES, *_WITHOUT)))
    return known[0]


def _obstacle(family: str, layer: nn.Module, *, strided: bool) -> str:
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return f"it is a {type(layer).__name__}: {family} makes Conv1d, Conv2d and linear layers sparse"
    if layer.groups > 1:
        return f"it has {layer.groups} groups: the rules are for plain convolutions"
    kernel_w, stride_w, channels = layer.kernel_size[-1], layer.stride[-1], layer.in_channels
    if max(layer.kernel_size) > _LARGEST_KERNEL:
        return f"kernel {tuple(layer.kernel_size)}: {family} takes at most {_LARGEST_KERNEL}"
    if strided and not 1 <= stride_w <= 2:
        return f"stride_w is {stride_w}: {family} takes 1 and 2"
    thin = (1 <= channels <= 4 and 3 <= kernel_w <= 8) or (strided and 4 < channels <= 8 and 2 <= kernel_w <= 4)
    return f"{channels} input channels with a kernel {kernel_w} wide are packed another way" if thin else ""
