# SPDX-License-Identifier: Apache-2.0
"""Random masked layers beside plain ones that have zeros in their weights, and inputs for both."""

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxslim.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLinear,
    MaskedWeights,
)
from fxslim.patterns import NM, Unstructured

CONVOLUTIONS = {1: MaskedConv1d, 2: MaskedConv2d, 3: MaskedConv3d}
TRANSPOSED = {1: MaskedConvTranspose1d, 2: MaskedConvTranspose2d, 3: MaskedConvTranspose3d}

patterns = st.sampled_from([NM(1, 2), NM(2, 4), NM(1, 3, 0), Unstructured(0.5), Unstructured(0.7, per_output=True)])
seeds = st.integers(0, 2**31)
gradients = st.sampled_from(["zero", "sr_ste"])


# One of each kind, small, with an input of 3 samples.
KINDS: dict[str, tuple[type[MaskedWeights], tuple[Any, ...], tuple[int, ...]]] = {
    "linear": (MaskedLinear, (8, 6), (3, 8)),
    "conv1d": (MaskedConv1d, (8, 6, 3), (3, 8, 7)),
    "conv2d": (MaskedConv2d, (8, 6, 3), (3, 8, 5, 5)),
    "conv3d": (MaskedConv3d, (8, 6, 2), (3, 8, 3, 3, 3)),
    "transposed1d": (MaskedConvTranspose1d, (8, 6, 3), (3, 8, 7)),
    "transposed2d": (MaskedConvTranspose2d, (8, 6, 3), (3, 8, 5, 5)),
    "transposed3d": (MaskedConvTranspose3d, (8, 6, 2), (3, 8, 3, 3, 3)),
}


def plain_twin(layer: MaskedWeights) -> Any:
    """A plain layer made by hand: a deep copy, with zeros written where masks are False."""
    twin = copy.deepcopy(layer)
    names = [name[: -len("_mask")] for name in dict(twin.named_buffers(recurse=False)) if name.endswith("_mask")]
    with torch.no_grad():
        for name in names:
            getattr(twin, name).mul_(getattr(twin, name + "_mask"))
    twin.__class__ = layer.float_class
    twin._forward_pre_hooks.clear()
    return twin


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[MaskedWeights, Tensor, dict[str, Any]]:
    """A convolution with any of its arguments, an input, and arguments of its forward."""
    torch.manual_seed(draw(seeds))
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    inputs, outputs = (groups * draw(st.integers(3, 5)) for _ in range(2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    masking = {"pattern": draw(patterns), "gradient": draw(gradients)}
    x = torch.randn(draw(st.integers(1, 2)), inputs, *each(6, 8), dtype=torch.float64)
    if draw(st.booleans()):
        x = x[0]
    if draw(st.booleans()):
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        settings |= {"padding": each(0, 1), "output_padding": extra}
        layer = TRANSPOSED[dims](inputs, outputs, kernel, **settings, **masking, dtype=torch.float64)
        sizes = draw(st.booleans()) and all(e < s for e, s in zip(extra, stride, strict=True))
        return layer, x, {"output_size": list(layer(x).shape[-dims:])} if sizes else {}
    settings["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if settings["padding_mode"] == "reflect" and dims == 3 and x.dim() == 4:
        x = x[None]
    named = ["same", "valid"] if set(stride) == {1} else ["valid"]
    settings["padding"] = draw(st.sampled_from(named)) if draw(st.booleans()) else each(0, 2)
    return CONVOLUTIONS[dims](inputs, outputs, kernel, **settings, **masking, dtype=torch.float64), x, {}
