# SPDX-License-Identifier: Apache-2.0
"""Configs in every dialect: what they mean, and what is told where they are wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim import ConfigError
from fxslim.nn import (
    ActivationQuant,
    Conv2dQAT,
    HandedOverLinearQAT,
    LinearQAT,
    QuantConfig,
    WeightQuant,
    as_quant_config,
)

# As users of that tool write it, clips of None included.
SEED = {
    "retrain_enable": True,
    "retrain_data_config": {
        "dst_type": "INT8", "batch_num": 10, "fixed_min": False, "clip_min": None, "clip_max": None
    },
    "retrain_weight_config": {"dst_type": "INT8", "weights_retrain_algo": "arq_retrain", "channel_wise": False},
}  # fmt: skip


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {**SEED, f"retrain_{part}_config": {**SEED[f"retrain_{part}_config"], **values}}


def test_the_dictionary_of_the_other_tool() -> None:
    config = Conv2dQAT(1, 6, kernel_size=5, config=SEED).quant_config
    assert config.weight == WeightQuant(bits=8, method="arq", granularity="tensor")
    assert config.activation == ActivationQuant(bits=8, method="ulq", signed=True, batch_num=10)
    assert config.output is None
    given_clips = as_quant_config(changed("data", clip_min=-1.5, clip_max=2.0, fixed_min=True)).activation
    assert (given_clips.clip_min, given_clips.clip_max, given_clips.fixed_min) == (-1.5, 2.0, True)
    assert as_quant_config(changed("data", dst_type="INT16")).activation.grid == (-32768, 32767)
    assert as_quant_config(changed("weight", weights_retrain_algo="ulq_retrain")).weight.method == "lsq"


@pytest.mark.parametrize("parts", [{}, {"retrain_data_config": None, "retrain_weight_config": None}])
def test_what_is_absent_has_its_default(parts: dict[str, Any]) -> None:
    said = {"retrain_enable": True, **parts}
    assert Conv2dQAT(1, 6, 5, config=said).quant_config.weight.granularity == "channel"
    assert LinearQAT(4, 6, config=said).quant_config.weight.granularity == "tensor"
    assert HandedOverLinearQAT(4, 6, config=said).quant_config.weight.granularity == "tensor"
    assert LinearQAT(4, 6, config=said).quant_config.activation.batch_num == 1


def test_a_layer_that_is_not_enabled_is_the_float_one() -> None:
    layer = LinearQAT(4, 6, config={**SEED, "retrain_enable": False})
    x = torch.randn(2, 4)
    for _ in range(3):
        assert torch.equal(layer(x), layer.to_float()(x))
    assert layer.quant_config.is_empty


def entry(**values: Any) -> dict[str, Any]:
    return {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"], **values}


def test_entries_of_a_config_list() -> None:
    found = as_quant_config(entry(quant_types=["weight", "input", "output"], quant_bits=4, quant_start_step=7))
    assert found.start_step == 7
    assert found.weight == WeightQuant(bits=4, granularity="tensor")
    assert found.activation == found.output == ActivationQuant(bits=4, method="min_max", symmetric=False, signed=False)
    apart = as_quant_config(entry(quant_types=["weight", "output"], quant_bits={"weight": 8, "output": 4}))
    assert (apart.weight.bits, apart.activation, apart.output.bits) == (8, None, 4)
    chinese = as_quant_config(entry(quant_types=["权重", "输入"], quant_bits={"weight": 8, "输入": 6}))
    assert (chinese.weight.bits, chinese.activation.bits) == (8, 6)
    schemes = {"weight": "per_channel_symmetric", "input": "per_tensor_symmetric"}
    said = as_quant_config(entry(quant_types=["weight", "input"], quant_scheme=schemes, quant_dtype="int"))
    assert said.weight.granularity == "channel"
    assert said.activation.symmetric
    assert as_quant_config(entry(quant_types=["input"], quant_dtype="int")).activation.grid == (-128, 127)


@pytest.mark.parametrize(
    "name, weight, activation",
    [("int8", 8, 8), ("int4", 4, 4), ("w4a8", 4, 8), ("w8a8", 8, 8), ("w4", 4, None), ("w2a16", 2, 16)],
)
def test_names(name: str, weight: int, activation: int | None) -> None:
    config = as_quant_config(name)
    assert config.weight.bits == weight
    assert (config.activation and config.activation.bits) == activation
    assert as_quant_config(config) is config


def test_nothing_said_is_int8() -> None:
    assert as_quant_config(None) == as_quant_config("int8") == LinearQAT(2, 2).quant_config


@given(
    bits=st.integers(2, 16), method=st.sampled_from(["arq", "lsq"]), group=st.sampled_from([None, 1, 32]),
    clips=st.sampled_from([None, (-1.0, 2.5)]), start=st.integers(0, 9), output=st.booleans(),
)  # fmt: skip
def test_written_and_read_again(bits: int, method: str, group, clips, start: int, output: bool) -> None:
    weight = WeightQuant(bits=bits, method=method, granularity="group" if group else "channel", group_size=group)
    low, high = clips or (None, None)
    activation = ActivationQuant(bits=bits, clip_min=low, clip_max=high, averaging=0.5)
    config = QuantConfig(weight=weight, activation=activation, output=activation if output else None, start_step=start)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert as_quant_config(config.to_dict()) == config


@pytest.mark.parametrize(
    "config, message",
    [
        (changed("data", clip_mni=-1.0), "unknown config key 'retrain_data_config.clip_mni'; did you mean"),
        ({**SEED, "retrain_enabled": True}, "unknown config key 'retrain_enabled'; did you mean 'retrain_enable'"),
        ({**SEED, "retrain_enable": 1}, "retrain_enable must be True or False, got 1"),
        (changed("weight", channel_wise=True), "channel_wise=True: in this dialect linear layers have one scale"),
        (changed("weight", channel_wise="yes"), "channel_wise must be True or False, got 'yes'"),
        (changed("weight", weights_retrain_algo="arq"), "unknown retrain_weight_config.weights_retrain_algo 'arq'"),
        (changed("weight", dst_type="INT7"), "unknown retrain_weight_config.dst_type 'INT7'; did you mean"),
        (changed("data", dst_type=8), "unknown retrain_data_config.dst_type '8'"),
        (changed("data", algo="ifmr"), "unknown retrain_data_config.algo 'ifmr'"),
        (changed("data", batch_num=0), "retrain_data_config.batch_num must be a whole number >= 1, got 0"),
        (changed("data", batch_num=True), "retrain_data_config.batch_num must be a whole number >= 1, got True"),
        (changed("data", fixed_min=1), "retrain_data_config.fixed_min must be True or False, got 1"),
        (changed("data", clip_max=1.0), "give both clips or neither, got retrain_data_config.clip_min=None"),
        (changed("data", clip_min=0.0, clip_max=1.0), "retrain_data_config.clip_min=0.0 must be < 0"),
        (changed("data", clip_min=-1.0, clip_max=0.0), "retrain_data_config.clip_max=0.0 must be > 0"),
        ({"retrain_data_config": [1]}, r"retrain_data_config must be a dict, got \[1\]"),
        ({"retrain_data_config": False}, "retrain_data_config must be a dict, got False"),
        (entry(quant_types=["weigth"]), "unknown quant_types 'weigth'; did you mean 'weight'"),
        (entry(quant_types="weight"), "quant_types must be a list of 'weight', 'input', 'output', got 'weight'"),
        (entry(quant_bits={"input": 8}), "quant_bits has no value for 'weight', which quant_types names"),
        ({"quant_types": ["weight"]}, "quant_bits is missing: give a number, or a dict"),
        (entry(quant_bits=32), "weight.bits must be a whole number from 2 to 16, got 32"),
        (entry(quant_start_step=-1), "start_step must be a whole number >= 0, got -1"),
        (entry(quant_scheme="per_layer"), "unknown quant_scheme 'per_layer'"),
        (entry(quant_types=["input"], quant_dtype="float"), "unknown quant_dtype 'float'"),
        (entry(quant_bit=8), "unknown config key 'quant_bit'; did you mean 'quant_bits'"),
        ("int88", "weight.bits must be a whole number from 2 to 16, got 88"),
        ("w4a1", "activation.bits must be a whole number from 2 to 16, got 1"),
        ("in8", "unknown config 'in8'; did you mean 'int8'"),
        (8, "config must be a QuantConfig, a name or a dict, got 8"),
        ({"wieght": {}}, "unknown config key 'wieght'; did you mean 'weight'"),
        ({"weight": {"bit": 4}}, "unknown config key 'weight.bit'; did you mean 'weight.bits'"),
        ({"weight": "int4"}, "weight must be a WeightQuant or None, got 'int4'"),
        ({"weight": {"bits": 1}}, "weight.bits must be a whole number from 2 to 16, got 1"),
        ({"weight": {"bits": 8.0}}, "weight.bits must be a whole number from 2 to 16, got 8.0"),
        ({"weight": {"method": "binary"}}, "weight.bits of method 'binary' must be a whole number from 1 to 1, got 8"),
        ({"weight": {"method": "alq"}}, "unknown weight.method 'alq'; did you mean 'lsq' or 'arq'"),
        ({"weight": {"granularity": "row"}}, "unknown weight.granularity 'row'"),
        ({"weight": {"granularity": "group"}}, "weight.group_size must be a whole number >= 1, got None"),
        ({"weight": {"group_size": 4}}, "weight.group_size is for granularity 'group', not 'channel'"),
        ({"weight": {"method": "dorefa"}}, "weight.method 'dorefa' has one grid per tensor, got granularity 'channel'"),
        ({"weight": {"narrow": 1}}, "weight.narrow must be True or False, got 1"),
        ({"weight": {"format": "fp8_e4m3", "method": "lsq"}}, "weight.format='fp8_e4m3' needs method 'arq', got 'lsq'"),
        ({"weight": {"format": "fp8"}}, "unknown weight.format 'fp8'; did you mean"),
        ({"activation": {"method": "pacts"}}, "unknown activation.method 'pacts'; did you mean 'pact'"),
        ({"activation": {"calibration": "imfr"}}, "unknown activation.calibration 'imfr'; did you mean 'ifmr'"),
        ({"activation": {"format": "fp8_e4m3"}}, "activation.format='fp8_e4m3' needs method 'min_max' or 'static'"),
        ({"activation": {"averaging": 0}}, r"activation.averaging must be a number in \(0, 1\], got 0"),
        ({"activation": {"symmetric": "no"}}, "activation.symmetric must be True or False, got 'no'"),
        ({"activation": {"symmetric": True, "signed": False}}, "activation.symmetric=True needs a signed grid"),
        ({"activation": {"clip_min": -1.0, "clip_max": float("inf")}}, "clip_max must be a finite number or None"),
        ({"activation": {"clip_min": float("nan"), "clip_max": 1.0}}, "clip_min must be a finite number"),
        ({"output": {"bits": 17}}, "output.bits must be a whole number from 2 to 16, got 17"),
        ({"start_step": True}, "start_step must be a whole number >= 0, got True"),
    ],
)  # fmt: skip
def test_errors(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearQAT(8, 4, config=config)
