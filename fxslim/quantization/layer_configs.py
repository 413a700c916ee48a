# SPDX-License-Identifier: Apache-2.0
"""Which config each layer gets: one for all, overrides, first and last, or a list of NNI's entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxslim.errors import ConfigError, UnsupportedLayerError
from fxslim.graph.layer_choice import Chosen, chosen_layers, settings_by_layer
from fxslim.nn import QuantConfig, as_quant_config
from fxslim.quantization.quantizable_layers import QuantizableLayer
from fxslim.quantization.targets import Target

_FLOAT = QuantConfig(weight=None, activation=None)
# What NNI's "default" stands for.
_NNI_DEFAULT = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
    "Embedding",
)


@dataclass(frozen=True, kw_only=True)
class LayerConfigs:
    """What a user said about layers; ``first`` and ``last`` are configs, or "float"."""

    config: Any
    layers: Chosen | None
    skip: Chosen
    overrides: Mapping[str | type, Any]
    first: Any
    last: Any
    target: Target

    def of(self, model: nn.Module, found: Sequence[QuantizableLayer], order: Sequence[str]) -> dict[str, QuantConfig]:
        """The config of each layer that is quantized; ``order``: layers as a forward calls them."""
        names = [one.name for one in found]
        wanted = self._wanted(model, names)
        skipped = chosen_layers(model, self.skip, "skip")
        _reach(model, self.skip, names, "skip")
        own = settings_by_layer(model, self.overrides, "overrides")
        _reach(model, list(self.overrides), names, "overrides")
        clash = sorted(own.keys() & skipped & set(names))
        if clash:
            raise ConfigError(f"{clash[0]} is in skip= and in overrides=: say one")
        ends = self._ends(order)
        chosen: dict[str, QuantConfig] = {}
        for one in found:
            if one.name in skipped or (wanted is not None and one.name not in wanted):
                continue
            said = own.get(one.name, ends.get(one.name, self._general(one)))
            config = self._config(said, one)
            if not config.is_empty:
                chosen[one.name] = config
        return chosen

    def _wanted(self, model: nn.Module, names: list[str]) -> set[str] | None:
        if self.layers is None:
            return None
        _reach(model, self.layers, names, "layers")
        return chosen_layers(model, self.layers, "layers")

    def _ends(self, order: Sequence[str]) -> dict[str, Any]:
        found = {}
        if order and self.first is not None:
            found[order[0]] = self.first
        if order and self.last is not None:
            found[order[-1]] = self.last
        if not order and (self.first is not None or self.last is not None):
            raise ConfigError("first= and last= need example_inputs=: a forward tells the order of layers")
        return found

    def _config(self, said: Any, one: QuantizableLayer) -> QuantConfig:
        if said == "float" or said is False:
            return _FLOAT
        return self.target.settled(one.counterpart.checked_config(said)) if not one.obstacle else as_quant_config(said)

    def _general(self, one: QuantizableLayer) -> Any:
        """The config for all, or that of the last of NNI's entries that matches the layer."""
        if not isinstance(self.config, list | tuple):
            return self.config
        said: Any = "float"
        for entry in self.config:
            if not isinstance(entry, Mapping):
                raise ConfigError(f"a list of configs holds dicts such as NNI's, got {entry!r}")
            types, names = entry.get("op_types"), entry.get("op_names")
            if types is None and names is None:
                raise ConfigError(f"an entry of a list of configs needs op_types or op_names: {dict(entry)}")
            kinds = [kind for t in types or () for kind in (_NNI_DEFAULT if t == "default" else (t,))]
            if (types is None or type(one.module).__name__ in kinds) and (names is None or one.name in names):
                said = "float" if entry.get("exclude") else dict(entry)
        return said


def _reach(model: nn.Module, chosen: Chosen, names: list[str], argument: str) -> None:
    """Each item must stand for a layer that can be quantized."""
    for item in [chosen] if isinstance(chosen, str | type) else chosen:
        if not chosen_layers(model, item, argument) & set(names):
            shown = item if isinstance(item, str) else getattr(item, "__name__", repr(item))
            raise ConfigError(f"{argument}: {shown} has no layer that can be quantized; layers are {names[:5]}...")


def refuse(one: QuantizableLayer, obstacle: str) -> None:
    """A layer that the user named can't be quantized."""
    raise UnsupportedLayerError(f"{one.name or 'the model'} can't be quantized: {obstacle}")
