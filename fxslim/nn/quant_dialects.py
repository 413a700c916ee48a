# SPDX-License-Identifier: Apache-2.0
"""Quantization configs in the words of other tools, translated in this one place."""

import re
from collections.abc import Mapping
from typing import Any

from fxslim.errors import ConfigError, unknown_name
from fxslim.nn.quant_config import ActivationQuant, QuantConfig, WeightQuant, at_path, check_keys

# AMCT's keys, as its users write them.
_AMCT = ("retrain_enable", "retrain_data_config", "retrain_weight_config")
_AMCT_DATA = ("dst_type", "batch_num", "fixed_min", "clip_min", "clip_max", "algo")
_AMCT_WEIGHT = ("dst_type", "weights_retrain_algo", "algo", "channel_wise")
_AMCT_METHODS = {"arq_retrain": "arq", "ulq_retrain": "lsq", "ulq_quantize": "lsq"}
_AMCT_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
# NNI's; what says which layers an entry is for is read elsewhere.
_NNI = ("quant_types", "quant_bits", "quant_start_step", "quant_dtype", "quant_scheme")
_NNI_LAYERS = ("op_types", "op_names", "exclude")
_NNI_TYPES = {
    "weight": "weight",
    "input": "activation",
    "output": "output",
    "权重": "weight",
    "输入": "activation",
    "输出": "output",
}
_NNI_SCHEMES = tuple(f"per_{part}_{kind}" for part in ("tensor", "channel") for kind in ("affine", "symmetric"))
_NAMES = ("int8", "int4", "fp8", "w4a8", "w8a8", "w4", "w8")


def as_quant_config(config: Any, layer_class: str = "") -> QuantConfig:
    """A ``QuantConfig``, a name, or a dict: its own, AMCT's (``retrain_data_config``) or NNI's (``quant_types``).

    Names: "int8", "w4a8" (weights of 4 bits, activations of 8), "w4" (weights alone), "fp8". None is "int8".

    >>> as_quant_config("w4").activation is None
    True
    >>> as_quant_config({"retrain_weight_config": {"channel_wise": False}}).weight.granularity
    'tensor'
    """
    if config is None:
        return QuantConfig()
    if isinstance(config, QuantConfig):
        return config
    if isinstance(config, str):
        return _named(config)
    if not isinstance(config, Mapping):
        raise ConfigError(f"config must be a QuantConfig, a name or a dict, got {config!r}")
    if any(str(key).startswith("retrain") for key in config):
        return _from_amct(config, layer_class)
    if any(str(key).startswith("quant_") for key in config):
        return _from_nni(config)
    return QuantConfig.from_dict(config)


def _named(name: str) -> QuantConfig:
    if name == "fp8":
        return QuantConfig(
            weight=WeightQuant(format="fp8_e4m3"), activation=ActivationQuant(format="fp8_e4m3", method="min_max")
        )
    found = re.fullmatch(r"int(\d+)|w(\d+)(?:a(\d+))?", name)
    if not found:
        raise ConfigError(unknown_name("config", name, _NAMES))
    same, weight, activation = found.groups()
    weight, activation = weight or same, activation or same
    return QuantConfig(
        weight=WeightQuant(bits=int(weight)), activation=ActivationQuant(bits=int(activation)) if activation else None
    )


def _from_amct(config: Mapping[str, Any], layer_class: str) -> QuantConfig:
    check_keys(config, "", _AMCT)
    enabled = config.get("retrain_enable", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"retrain_enable must be True or False, got {enabled!r}")
    if not enabled:
        return QuantConfig(weight=None, activation=None)
    return QuantConfig(
        weight=_amct_weight(_part(config, "retrain_weight_config", _AMCT_WEIGHT), layer_class),
        activation=_amct_activation(_part(config, "retrain_data_config", _AMCT_DATA)),
    )


def _part(config: Mapping[str, Any], name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """One of AMCT's dicts; None means absent."""
    part = {} if config.get(name) is None else config[name]
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} must be a dict, got {part!r}")
    check_keys(part, f"{name}.", known)
    return {key: value for key, value in part.items() if value is not None}


def _bits(part: Mapping[str, Any], path: str) -> int:
    name = part.get("dst_type", "INT8")
    if name not in _AMCT_BITS:
        raise ConfigError(unknown_name(f"{path}.dst_type", str(name), _AMCT_BITS))
    return _AMCT_BITS[name]


def _amct_weight(part: dict[str, Any], layer_class: str) -> WeightQuant:
    linear = "Linear" in layer_class
    per_channel = part.get("channel_wise", not linear)
    if not isinstance(per_channel, bool):
        raise ConfigError(f"retrain_weight_config.channel_wise must be True or False, got {per_channel!r}")
    if linear and per_channel:
        raise ConfigError(
            "retrain_weight_config.channel_wise=True: in this dialect linear layers have one scale; leave it out, or "
            "give QuantConfig(weight=WeightQuant(granularity='channel'))"
        )
    method = part.get("weights_retrain_algo", part.get("algo", "arq_retrain"))
    if method not in _AMCT_METHODS:
        raise ConfigError(unknown_name("retrain_weight_config.weights_retrain_algo", str(method), _AMCT_METHODS))
    granularity = "channel" if per_channel else "tensor"
    return WeightQuant(bits=_bits(part, "retrain_weight_config"), method=_AMCT_METHODS[method], granularity=granularity)


def _amct_activation(part: dict[str, Any]) -> ActivationQuant:
    bits = _bits(part, "retrain_data_config")
    part.pop("dst_type", None)
    method = part.pop("algo", "ulq_quantize")
    if method != "ulq_quantize":
        raise ConfigError(unknown_name("retrain_data_config.algo", str(method), ["ulq_quantize"]))
    return at_path("retrain_data_config", ActivationQuant, {"bits": bits, "signed": True, **part})


def _from_nni(config: Mapping[str, Any]) -> QuantConfig:
    check_keys(config, "", [*_NNI, *_NNI_LAYERS])
    types = config.get("quant_types")
    if not isinstance(types, list | tuple) or not types:
        raise ConfigError(f"quant_types must be a list of 'weight', 'input', 'output', got {types!r}")
    parts: dict[str, Any] = {"weight": None, "activation": None, "output": None}
    for kind in types:
        if kind not in _NNI_TYPES:
            raise ConfigError(unknown_name("quant_types", str(kind), ["weight", "input", "output"]))
        part, bits = _NNI_TYPES[kind], _nni_value(config, "quant_bits", kind, None)
        scheme = _nni_value(config, "quant_scheme", kind, None)
        if scheme not in (None, *_NNI_SCHEMES):
            raise ConfigError(unknown_name("quant_scheme", str(scheme), _NNI_SCHEMES))
        if part == "weight":
            per_channel = scheme is not None and "channel" in scheme
            parts[part] = WeightQuant(bits=bits, granularity="channel" if per_channel else "tensor")
            continue
        dtype = _nni_value(config, "quant_dtype", kind, "uint")
        if dtype not in ("int", "uint"):
            raise ConfigError(unknown_name("quant_dtype", str(dtype), ["int", "uint"]))
        symmetric = scheme is not None and scheme.endswith("symmetric")
        said = {"bits": bits, "method": "min_max", "symmetric": symmetric, "signed": dtype == "int" or symmetric}
        parts[part] = at_path(part, ActivationQuant, said)
    return QuantConfig(start_step=config.get("quant_start_step", 0), **parts)


def _nni_value(config: Mapping[str, Any], key: str, kind: str, usual: Any) -> Any:
    """One value for all types, or a dict with one for each."""
    value = config.get(key, usual)
    if isinstance(value, Mapping):
        found = [each for name, each in value.items() if _NNI_TYPES.get(name) == _NNI_TYPES[kind]]
        if not found:
            raise ConfigError(f"{key} has no value for {kind!r}, which quant_types names: {dict(value)}")
        return found[0]
    if value is None and key == "quant_bits":
        raise ConfigError("quant_bits is missing: give a number, or a dict with one for each of quant_types")
    return value
