# SPDX-License-Identifier: Apache-2.0
"""Random quantized layers beside plain ones, their inputs, and the formulas of grids in NumPy."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim.nn import (
    Conv1dQAT,
    Conv2dQAT,
    Conv3dQAT,
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    ConvTranspose3dQAT,
    LinearQAT,
    QuantConfig,
    QuantizedLayer,
    WeightQuant,
)

CONVOLUTIONS: dict[int, tuple[type[QuantizedLayer], type[QuantizedLayer]]] = {
    1: (Conv1dQAT, ConvTranspose1dQAT),
    2: (Conv2dQAT, ConvTranspose2dQAT),
    3: (Conv3dQAT, ConvTranspose3dQAT),
}
NOTHING = QuantConfig(weight=None, activation=None)
seeds = st.integers(0, 2**31)

# One of each kind, small, with an input of 3 samples.
KINDS: dict[str, tuple[type[QuantizedLayer], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (LinearQAT, (8, 6), (3, 8)),
    "conv1d": (Conv1dQAT, (8, 6, 3), (3, 8, 7)),
    "conv2d": (Conv2dQAT, (8, 6, 3), (3, 8, 5, 5)),
    "conv3d": (Conv3dQAT, (8, 6, 2), (3, 8, 3, 3, 3)),
    "transposed1d": (ConvTranspose1dQAT, (8, 6, 3), (3, 8, 7)),
    "transposed2d": (ConvTranspose2dQAT, (8, 6, 3), (3, 8, 5, 5)),
    "transposed3d": (ConvTranspose3dQAT, (8, 6, 2), (3, 8, 3, 3, 3)),
}


def weights_only(**settings: Any) -> QuantConfig:
    """A config whose activations stay in float."""
    return QuantConfig(weight=WeightQuant(**settings), activation=None)


@st.composite
def plain_layers(draw: st.DrawFn) -> tuple[nn.Module, type[QuantizedLayer], Tensor, dict[str, Any]]:
    """A layer in float64 with any of its arguments, its counterpart, an input, and arguments of its forward."""
    torch.manual_seed(draw(seeds))
    dims, groups, bias = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    if dims == 0:
        sides = draw(st.integers(1, 4)) * 2, draw(st.integers(1, 7))
        x = torch.randn(*draw(st.lists(st.integers(0, 3), max_size=3)), sides[0], dtype=torch.float64)
        return nn.Linear(*sides, bias=bias, dtype=torch.float64), LinearQAT, x, {}
    inputs, outputs = groups * 2 * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    settings: dict[str, Any] = {
        "stride": stride, "dilation": dilation, "groups": groups, "bias": bias, "dtype": torch.float64
    }  # fmt: skip
    x = torch.randn(draw(st.integers(1, 2)), inputs, *each(6, 8), dtype=torch.float64)
    if draw(st.booleans()):
        cls = CONVOLUTIONS[dims][0]
        settings["padding"] = draw(st.sampled_from(["valid", each(0, 2)]))
        return cls.float_class(inputs, outputs, kernel, **settings), cls, x, {}
    cls = CONVOLUTIONS[dims][1]
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    layer = cls.float_class(inputs, outputs, kernel, **settings, padding=each(0, 1), output_padding=extra)
    sizes = draw(st.booleans()) and all(e < s for e, s in zip(extra, stride, strict=True))
    return layer, cls, x, {"output_size": list(layer(x).shape[-dims:])} if sizes else {}


def rows_of(layer: Any, weight: Tensor) -> np.ndarray:
    """A weight as (out, in of a group, *kernel), entry by entry."""
    w = weight.detach().double().numpy()
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return w
    groups, each = layer.groups, w.shape[0] // layer.groups
    return np.stack(
        [
            np.stack([w[g * each + i, o] for i in range(each)])
            for g in range(groups)
            for o in range(w.shape[1])
        ]
    )  # fmt: skip


def as_groups(rows: np.ndarray, config: WeightQuant) -> np.ndarray:
    """What shares a scale, one line each."""
    if config.granularity == "tensor":
        return rows.reshape(1, -1)
    if config.granularity == "channel":
        return rows.reshape(rows.shape[0], -1)
    size = config.group_size
    assert size is not None
    parts = [rows[:, i : i + size].reshape(rows.shape[0], -1) for i in range(0, rows.shape[1], size)]
    return np.stack(parts, 1).reshape(rows.shape[0] * len(parts), -1)


def symmetric_scales(lines: np.ndarray, bits: int, narrow: bool = False) -> np.ndarray:
    """The smallest that cover each line: max over 2^(n-1)-1 steps above 0, and 2^(n-1) below."""
    most = 2 ** (bits - 1) - 1
    above, below = lines.max(1).clip(0) / most, -(lines.min(1).clip(None, 0)) / (most if narrow else most + 1)
    found = np.maximum(above, below)
    return np.where(found == 0, 1.0, found)


def on_grid(x: np.ndarray, scale: Any, zero_point: Any, least: int, most: int) -> np.ndarray:
    """``(clamp(round_half_even(x / scale) + zero_point) - zero_point) * scale``."""
    steps = np.clip(np.round(x / scale) + zero_point, least, most)
    return (steps - zero_point) * scale
