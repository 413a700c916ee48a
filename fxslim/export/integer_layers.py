# SPDX-License-Identifier: Apache-2.0
"""Layers of a QDQ file whose input and weight are quantized: int8 weight, int32 bias, scale of their products."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fxslim.errors import ExportError
from fxslim.export.graph_lookups import Array, GraphLookups, attribute_values, describe
from fxslim.export.integer_grids import GridConstant, grid_constant

_log = logging.getLogger(__name__)

LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1}
# Exporters compute the scale of a bias in float32 or in float64: the last bit may differ.
SAME_SCALE = 1e-6


class Quantized(Protocol):
    """What is needed to know of the activation that a layer reads."""

    @property
    def node(self) -> Any: ...
    @property
    def scale(self) -> Any: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerLayer:
    """``product_scale`` is float32(scale of the input x scale of the weight), one number or one per output channel."""

    node: Any
    weight: GridConstant
    bias: Array | None
    product_scale: Array
    quantized_input: str

    def float_bias(self) -> Array | None:
        """What the int32 bias stands for."""
        return None if self.bias is None else (self.bias.astype(np.float32) * self.product_scale).astype(np.float32)


def read_layer(graph: GraphLookups, node: Any, activations: Mapping[str, Quantized]) -> IntegerLayer | None:
    """The layer, None where its weight is in float; a quantized weight on an input in float is an error."""
    data, weight_name = node.input[0], node.input[1]
    activation, weight = activations.get(data), grid_constant(graph, weight_name)
    if weight_name in activations:
        raise ExportError(
            f"{describe(node)}: its second input {weight_name!r} is an activation; a quantized layer needs a constant "
            "weight there: leave both inputs in float"
        )
    if weight is None:
        if activation is not None:
            _log.warning("%s stays in float: its input is quantized, its weight is not", describe(node))
        return None
    if activation is None:
        raise ExportError(
            f"{describe(node)}: its weight is quantized, but its input is not; integers need both: quantize the input "
            "too, or skip this layer"
        )
    _check_weight(node, weight)
    _check_attributes(node, weight)
    scale = _product_scale(node, activation.scale, weight)
    bias = _read_bias(graph, node, scale, _channels(node, weight))
    quantized = activation.node.output[0]
    return IntegerLayer(node=node, weight=weight, bias=bias, product_scale=scale, quantized_input=quantized)


def _check_weight(node: Any, weight: GridConstant) -> None:
    grid, kind = weight.grid, node.op_type
    if grid.dtype == "int32":
        raise ExportError(f"{describe(node)}: its weight is int32, expected int8")
    if grid.zero_point.any():
        wrong = int(grid.zero_point[np.flatnonzero(grid.zero_point)[0]]) + grid.shift
        raise ExportError(
            f"{describe(node)}: its weight has zero point {wrong} ({grid.dtype}), expected {grid.shift}: weights must "
            "be symmetric"
        )
    if kind == "MatMul" and weight.values.ndim != 2:
        raise ExportError(f"{describe(node)}: its weight has shape {list(weight.values.shape)}, expected 2 dimensions")
    if grid.scale.size == 1:
        return
    if kind not in CHANNEL_AXES:
        raise ExportError(
            f"{describe(node)}: its weight has {grid.scale.size} scales; {kind} is converted with one scale per tensor "
            'only: prepare it with granularity="tensor"'
        )
    if grid.axis != CHANNEL_AXES[kind]:
        raise ExportError(
            f"{describe(node)}: its weight has scales along axis {grid.axis}, expected output channels, axis "
            f"{CHANNEL_AXES[kind]}"
        )


def _check_attributes(node: Any, weight: GridConstant) -> None:
    found = attribute_values(node)
    if node.op_type == "Gemm":
        wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise ExportError(f"{describe(node)}: {name}={found[name]}, but integers need {name}={value}")
    dilation = found.get("dilations", [1])[0]
    if node.op_type == "Conv" and weight.values.ndim == 5 and dilation != 1:
        raise ExportError(
            f"{describe(node)}: dilation {dilation} along depth, but a quantized 3d convolution needs 1 there"
        )


def _channels(node: Any, weight: GridConstant) -> int:
    shape, found = weight.values.shape, attribute_values(node)
    if node.op_type == "ConvTranspose":
        return shape[1] * found.get("group", 1)
    if node.op_type == "Gemm" and not found.get("transB", 0):
        return shape[1]
    return shape[1] if node.op_type == "MatMul" else shape[0]


def _product_scale(node: Any, data_scale: Any, weight: GridConstant) -> Array:
    with np.errstate(all="ignore"):
        scale = (np.float32(data_scale) * weight.grid.scale).astype(np.float32)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ExportError(
            f"{describe(node)}: scale of input {data_scale:.3g} x scale of weight is not a float32 above 0"
        )
    if node.op_type == "ConvTranspose" and scale.size > 1:
        # The file has one scale per channel of a group, and all groups share them.
        scale = np.tile(scale, attribute_values(node).get("group", 1))
    return scale


def _read_bias(graph: GraphLookups, node: Any, product_scale: Array, channels: int) -> Array | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    name = node.input[2]
    stored = grid_constant(graph, name)
    if stored is not None and stored.grid.dtype == "int32":
        sizes = {stored.grid.scale.size, product_scale.size} - {1}
        same = len(sizes) < 2 and np.allclose(stored.grid.scale, product_scale, rtol=SAME_SCALE, atol=0)
        if same and not stored.grid.zero_point.any():
            return _one_per_channel(node, stored.values, channels)
    floats = graph.constant(name) if stored is None else stored.floats()
    if floats is None:
        raise ExportError(f"{describe(node)}: its bias {name!r} is computed, expected a constant")
    if floats.dtype != np.float32:
        raise ExportError(f"{describe(node)}: its bias is {floats.dtype}; only float32 models can be converted")
    steps = np.rint(_one_per_channel(node, floats, channels) / product_scale.astype(np.float64))
    limits = np.iinfo(np.int32)
    outside = ~((steps >= limits.min) & (steps <= limits.max))
    if outside.any():
        channel = int(np.flatnonzero(outside)[0])
        raise ExportError(
            f"{describe(node)}: its bias of channel {channel} is {steps[channel]:.6g} steps of "
            f"{np.broadcast_to(product_scale, (channels,))[channel]:.3g}, which int32 can't hold: leave "
            "this layer in float"
        )
    return steps.astype(np.int32)


def _one_per_channel(node: Any, bias: Array, channels: int) -> Array:
    if bias.size == 1 and node.op_type == "Gemm":
        return np.full(channels, bias.reshape(-1)[0])
    if bias.size != channels or bias.shape[-1] != channels:
        raise ExportError(
            f"{describe(node)}: its bias has shape {list(bias.shape)}, expected one number per channel, {channels}"
        )
    return bias.reshape(-1)
