# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a 2:4 weight, multiplied by the sparse tensor cores of NVIDIA GPUs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.nn.deployed_layers import keep_from_fusing
from fxslim.nn.masked_weights import MaskedWeights
from fxslim.patterns import NM, check

_COMPRESSED = "_compressed"
_DTYPES = (torch.float16, torch.bfloat16)
# Rows and columns of a weight must be multiples of these, in torch's kernels.
ROWS, COLUMNS = 32, 64


def why_not_semi_structured(weight: Tensor) -> str:
    """Why torch's kernels don't take such a 2:4 weight; "" where they do."""
    if weight.device.type != "cuda":
        return f"2:4 brings no speed on {weight.device.type}, only on NVIDIA GPUs"
    if weight.dtype not in _DTYPES:
        return f"2:4 kernels take float16 and bfloat16, not {weight.dtype}"
    if weight.dim() != 2:
        return "torch has 2:4 kernels for linear layers only"
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return f"2:4 kernels take multiples of {ROWS}x{COLUMNS}, not {weight.shape[0]}x{weight.shape[1]}"
    violations = check(weight, NM(2, 4)).violations
    return f"{violations} groups of four hold more than two weights" if violations else ""


class SemiStructuredLinear(nn.Module):
    """``nn.Linear`` with a 2:4 weight. The state holds it with its zeros; the compressed form is made from that."""

    weight: Tensor
    bias: Tensor | None
    kernel = "2:4"

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.masked() if isinstance(layer, MaskedWeights) else layer.weight
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        keep_from_fusing(self)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs)."""
        with torch.no_grad():
            if self.has_kernel(input):
                return F.linear(input, self._compressed_weight(), self.bias)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether the GPU multiplies this input with the compressed weight; else the dense one is used."""
        weight = self.weight
        return weight.device.type == "cuda" and weight.dtype in _DTYPES and x.dtype == weight.dtype and x.numel() > 0

    def _compressed_weight(self) -> Tensor:
        made = self.__dict__.get(_COMPRESSED)
        state = self.weight, -1 if self.weight.is_inference() else self.weight._version
        if made is None or made[0] is not state[0] or made[1] != state[1]:
            made = (*state, torch.sparse.to_sparse_semi_structured(self.weight))
            self.__dict__[_COMPRESSED] = made
        return made[2]

    def __getstate__(self) -> dict[str, Any]:
        # Copies make their own.
        return {name: value for name, value in self.__dict__.items() if name != _COMPRESSED}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, 2:4"
