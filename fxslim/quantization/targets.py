# SPDX-License-Identifier: Apache-2.0
"""What each deployment target computes in integers, and on which grids (docs/quantization.md has the table)."""

from dataclasses import dataclass, replace

from fxslim.errors import ConfigError, unknown_name
from fxslim.nn import ActivationQuant, QuantConfig


@dataclass(frozen=True, kw_only=True)
class Target:
    """``sums``, ``pools``: sums and averages of activations are computed in integers, so that what they read and give
    is quantized. ``residuals``: of a sum, the side that no layer made is quantized. ``outputs``: what layers give is.
    """

    name: str
    signed: bool
    symmetric: bool
    sums: bool = False
    pools: bool = False
    residuals: bool = False
    outputs: bool = False

    def settled(self, config: QuantConfig) -> QuantConfig:
        """The config with the grids of this target; one that says another grid is an error."""
        return replace(
            config,
            activation=self.settled_activation(config.activation, "activation"),
            output=self.settled_activation(config.output, "output"),
        )

    def settled_activation(self, config: ActivationQuant | None, path: str) -> ActivationQuant | None:
        """The same for one activation."""
        if config is None:
            return None
        for name, ours in (("signed", self.signed), ("symmetric", self.symmetric)):
            theirs = getattr(config, name)
            if theirs is not None and theirs != ours and config.format == "int":
                raise ConfigError(
                    f"{path}.{name}={theirs}, but target {self.name!r} computes with {name}={ours}: leave it None, or "
                    "choose another target"
                )
        return replace(config, signed=self.signed, symmetric=self.symmetric)


TARGETS = {
    target.name: target
    for target in (
        Target(name="onnxruntime", signed=False, symmetric=False, sums=True, pools=True, outputs=True),
        Target(name="openvino", signed=False, symmetric=False, sums=True, pools=True),
        Target(name="tensorrt", signed=True, symmetric=True, residuals=True),
        Target(name="ascend", signed=True, symmetric=False),
    )
}


def as_target(target: str | Target) -> Target:
    """A target, or one of the names.

    >>> as_target("tensorrt").symmetric
    True
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ConfigError(unknown_name("target", str(target), TARGETS))
    return TARGETS[target]
