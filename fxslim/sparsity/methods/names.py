# SPDX-License-Identifier: Apache-2.0
"""Methods by name, and from plain data."""

from typing import Any

from fxslim.errors import ConfigError, unknown_name
from fxslim.sparsity.methods.activation_scored import Par, Wanda
from fxslim.sparsity.methods.first_order import FirstOrder
from fxslim.sparsity.methods.hessian import Hessian
from fxslim.sparsity.methods.magnitude import Magnitude
from fxslim.sparsity.methods.method import Method

NAMES: dict[str, Method] = {
    "magnitude": Magnitude(), "l1": Magnitude(), "l2": Magnitude(norm=2), "first_order": FirstOrder(),
    "taylor": FirstOrder(), "wanda": Wanda(), "par": Par(), "par_v2": Par(version=2), "hessian": Hessian(),
}  # fmt: skip
_KINDS: dict[str, type[Any]] = {kind.name: kind for kind in (Magnitude, FirstOrder, Wanda, Par, Hessian)}


def as_method(method: Any) -> Method:
    """A method, or the one that a name means.

    >>> as_method("par_v2").version
    2
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise ConfigError(f"method must be a name such as 'magnitude', or one of fxslim.sparsity; got {method!r}")
    if method not in NAMES:
        raise ConfigError(unknown_name("method", method, NAMES))
    return NAMES[method]


def method_from_dict(data: dict[str, Any]) -> Method:
    """The method that ``to_dict`` wrote.

    >>> method_from_dict({"name": "hessian", "damping": 0.1}).damping
    0.1
    """
    settings = dict(data)
    name = str(settings.pop("name", ""))
    if name not in _KINDS:
        raise ConfigError(unknown_name("method", name, _KINDS))
    try:
        return _KINDS[name](**settings)
    except TypeError as error:
        raise ConfigError(f"method {name!r}: {error}") from error
