# SPDX-License-Identifier: Apache-2.0
"""Methods of choosing a range by name."""

import inspect
from typing import Any

from fxslim.errors import ConfigError, unknown_name
from fxslim.ranges.entropy import Entropy
from fxslim.ranges.hfmg import Hfmg
from fxslim.ranges.ifmr import Ifmr
from fxslim.ranges.method import RangeMethod
from fxslim.ranges.min_max import MinMax
from fxslim.ranges.moving_average import MovingAverage
from fxslim.ranges.mse import Mse
from fxslim.ranges.percentile import Percentile

METHODS: dict[str, type[RangeMethod]] = {
    method.name: method for method in (MinMax, MovingAverage, Percentile, Mse, Ifmr, Hfmg, Entropy)
}


def range_method(name: str, **options: Any) -> RangeMethod:
    """A method that has seen nothing yet; ``options`` are those of its class.

    >>> import torch
    >>> method = range_method("percentile", percentile=1.0)
    >>> method.observe(torch.tensor([-1.0, 0.5]))
    >>> method.range(-128, 127, symmetric=True)
    (tensor(-1.), tensor(0.9922))
    """
    if name not in METHODS:
        raise ConfigError(unknown_name("range method", str(name), METHODS))
    method = METHODS[name]
    if options:
        known = list(inspect.signature(method).parameters)
        for option in options:
            if option not in known:
                raise ConfigError(unknown_name(f"option of range method {name!r}", option, known))
    return method(**options)
