# SPDX-License-Identifier: Apache-2.0
"""Which weights get a mask: those that the user names, that can have one, and that can follow the pattern."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxslim.errors import ConfigError, UnsupportedLayerError, unknown_name
from fxslim.graph.layer_choice import Chosen, chosen_layers, settings_by_layer
from fxslim.patterns import Pattern, as_pattern, eligible
from fxslim.patterns.pattern import check_ratio
from fxslim.patterns.weight_layout import layout_of
from fxslim.sparsity.maskable_weights import MaskableWeight, find_unmaskable, find_weights, shared_weights
from fxslim.sparsity.methods import Method, Par

_log = logging.getLogger(__name__)
INELIGIBLE = ("warn", "error", "ignore")
# Words in the names of layers that say what they belong to.
_ROLES = {
    "attention_ratio": ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv", "query", "key", "value"),
    "mlp_ratio": ("mlp", "ffn", "feed_forward", "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "intermediate"),
}


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What a user said about layers."""

    layers: Chosen | None
    skip: Chosen
    overrides: Mapping[str | type, Any]
    ineligible: str
    chip: str | None
    bits: int

    def __post_init__(self) -> None:
        if self.ineligible not in INELIGIBLE:
            raise ConfigError(unknown_name("ineligible", str(self.ineligible), INELIGIBLE))
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides must be a dict of layers, got a {type(self.overrides).__name__}")

    def patterns(
        self, model: nn.Module, pattern: Pattern, method: Method, users: Mapping[str, str]
    ) -> tuple[dict[str, Pattern], list[str]]:
        """The pattern of each weight, by name, and what is left out and why."""
        weights = find_weights(model, users)
        layer_of = {weight.name: weight.layer for weight in weights}
        wanted = (
            None
            if self.layers is None
            else _maskable(model, _named(self.layers, layer_of, "layers"), weights, "layers")
        )
        skipped = chosen_layers(model, _named(self.skip, layer_of, "skip"), "skip")
        overrides = {_named([item], layer_of, "overrides")[0]: setting for item, setting in self.overrides.items()}
        _maskable(model, list(overrides), weights, "overrides")
        own = settings_by_layer(model, overrides, "overrides")
        by_role = _ratios_by_role(method, weights)
        uses = shared_weights(model)
        found: dict[str, Pattern] = {}
        notes: list[str] = []
        for weight in weights:
            if weight.layer in skipped or (wanted is not None and weight.layer not in wanted):
                continue
            chosen = _own_pattern(pattern, own.get(weight.layer), method, weight.layer)
            if weight.layer not in own and weight.layer in by_role:
                chosen = chosen.gentler(by_role[weight.layer])
            if not chosen.removed():
                continue
            obstacle = weight.obstacle
            if not obstacle and uses[id(weight.weight)] > 1:
                obstacle = "its weight is shared with another layer"
            obstacle = obstacle or self._obstacle(weight, chosen)
            if not obstacle:
                found[weight.name] = chosen
            else:
                notes.append(self._told(weight.name, obstacle))
        if wanted is None:
            others = {name: kind for name, kind in find_unmaskable(model).items() if name not in skipped}
            notes += [self._told(name, f"masks are for no {kind}") for name, kind in others.items()]
        return found, notes

    def _told(self, name: str, obstacle: str) -> str:
        """The note that something stays dense, as loud as the user wishes."""
        if self.ineligible == "error":
            raise UnsupportedLayerError(f"{name}: {obstacle}; name it in skip=")
        note = f"{name} stays dense: {obstacle}"
        if self.ineligible == "warn":
            _log.warning("sparsity: %s", note)
        return note

    def _obstacle(self, weight: MaskableWeight, pattern: Pattern) -> str:
        layout = layout_of(weight.module)
        value = weight.weight.detach()
        if self.chip is not None:
            allowed = eligible(self.chip, weight.module, self.bits)
            if not allowed:
                return allowed.reason
        obstacle = pattern.obstacle(tuple(layout.rows(value).shape), layout.groups)
        if obstacle or value.is_meta:
            return obstacle
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ConfigError(
                f"{weight.name} has NaN or infinity in {bad} of {value.numel()} entries: mend it, or name the layer "
                "in skip="
            )
        return "" if value.any() else "all its entries are 0"


def _named(chosen: Chosen, layer_of: Mapping[str, str], argument: str) -> list[str | type]:
    """The same choice, with layers for the names of their weights."""
    items: list[Any] = [chosen] if isinstance(chosen, str | type) or not isinstance(chosen, Iterable) else list(chosen)
    for item in items:
        if not isinstance(item, str | type):
            raise ConfigError(f"{argument} takes names, globs and types of layers, got {item!r}")
    return [layer_of.get(item, item) if isinstance(item, str) else item for item in items]


def _maskable(model: nn.Module, chosen: Chosen, weights: list[MaskableWeight], argument: str) -> set[str]:
    """The layers that ``chosen`` stands for; each item must have a layer that could be masked."""
    known = {weight.layer for weight in weights}
    found: set[str] = set()
    for item in [chosen] if isinstance(chosen, str | type) else chosen:
        names = chosen_layers(model, item, argument)
        if not names & known:
            where = sorted(names)[:3] if names else "no layer of this model"
            raise UnsupportedLayerError(
                f"{argument}: {item!r} is {where}: masks are for linear layers, convolutions and nn.MultiheadAttention"
            )
        found |= names
    return found


def _own_pattern(pattern: Pattern, override: Any, method: Method, layer: str) -> Pattern:
    """A layer's own pattern or ratio, from ``overrides``."""
    if override is None:
        return pattern
    if isinstance(override, str | Pattern):
        found = as_pattern(override)
        return method.pattern_for(found if found.removed() is not None else found.at(pattern.removed()))
    check_ratio(override, f"overrides: the ratio of {layer}")
    if not override:
        return pattern.gentler(0.0)
    return pattern.at(override) if type(pattern).__name__ == "NM" else pattern.gentler(float(override))


def _ratios_by_role(method: Method, weights: list[MaskableWeight]) -> dict[str, float]:
    """Ratios of attention and MLP layers, told apart by their names."""
    found: dict[str, float] = {}
    if not isinstance(method, Par):
        return found
    for setting, words in _ROLES.items():
        ratio = getattr(method, setting)
        if ratio is None:
            continue
        layers = [w.layer for w in weights if any(word in w.layer.lower() for word in words)]
        if not layers:
            raise ConfigError(f"{setting}={ratio}: no layer has one of {words} in its name; give overrides=")
        found |= dict.fromkeys(layers, ratio)
    return found
