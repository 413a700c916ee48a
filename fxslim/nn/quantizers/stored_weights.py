# SPDX-License-Identifier: Apache-2.0
"""What quantization makes of a weight, kept: integers and their scales."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxslim.kernels.quantization_grid import along_axis
from fxslim.nn.quantizers.onnx_lowering import is_lowering, lowered_weight

if TYPE_CHECKING:
    from fxslim.nn.quantizers.weights import WeightQuantizer


class StoredWeight(nn.Module):
    """Integers with one scale, with one each along ``axis``, or with one for each group of inputs of an output.

    Its forward takes no notice of the weight that it is called with. Grids of more than 8 bits and float grids are
    ``values``, in float.
    """

    integers: Tensor | None
    scale: Tensor | None
    zero_point: Tensor
    values: Tensor | None

    @torch.no_grad()
    def __init__(self, quantizer: "WeightQuantizer", weight: Tensor, folded: Tensor | None = None) -> None:
        super().__init__()
        config, self.layout, self.dtype = quantizer.config, quantizer.layout, weight.dtype
        self.bits, self.num_outputs = config.bits, quantizer.layout.rows(weight).shape[0]
        self.is_grouped = config.granularity == "group"
        # Outputs of a grouped transposed convolution are no axis of its weight.
        self.in_rows = self.is_grouped or (self.layout.transposed and self.layout.groups > 1)
        self.axis: int | None = None
        values, scale = quantizer.values_and_scale(weight, folded)
        if scale is not None:
            # A scale of 0 is that of a row of zeros.
            scale = torch.where(scale == 0, 1, scale)
        integers = None if scale is None else self._integers(values, scale)
        self.register_buffer("values", values if integers is None else None)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", None if integers is None or scale is None else self._kept(scale))
        # Runtimes ask for it.
        self.register_buffer(
            "zero_point", None if self.scale is None else torch.zeros_like(self.scale, dtype=torch.int8)
        )
        if folded is not None and not quantizer.minds_no_folding:
            self.multiply_outputs(1 / folded)

    def _integers(self, values: Tensor, scale: Tensor) -> Tensor | None:
        rows = self.layout.rows(values) if self.in_rows else values
        if self.is_grouped:
            size = values.numel() // scale.numel() // max(rows[0, 0].numel(), 1)
            rows = rows.unflatten(1, (-1, size)).flatten(0, 1)
        if scale.numel() > 1 or self.is_grouped:
            self.axis = self._output_axis
        steps = torch.round(rows / along_axis(scale.to(rows.dtype), rows, self.axis))
        if steps.numel() and not steps.abs().amax() <= -torch.iinfo(torch.int8).min:
            return None
        return steps.clamp(max=torch.iinfo(torch.int8).max).to(torch.int8)

    @property
    def _output_axis(self) -> int:
        return 1 if self.layout.transposed and not self.in_rows else 0

    def _kept(self, scale: Tensor) -> Tensor:
        return scale.detach().reshape(() if self.axis is None else -1).float().clone()

    @torch.no_grad()
    def multiply_outputs(self, factors: Tensor) -> None:
        """Each output times its factor. A negative one turns the integers; what has no opposite loses one step."""
        if self.values is not None:
            rows = self.layout.rows(self.values) * factors.to(self.dtype).reshape(-1, *[1] * (self.values.dim() - 1))
            self.values = self.layout.restored(rows)
            return
        assert self.integers is not None
        assert self.scale is not None
        if self.axis is None:
            self.axis, self.scale = self._output_axis, self.scale.expand(self.num_outputs)
            self.zero_point = torch.zeros_like(self.scale, dtype=torch.int8)
        factors = factors.float().repeat_interleave(self.scale.numel() // self.num_outputs)
        sign = along_axis(factors.sign().to(torch.int8), self.integers, self.axis)
        most = (1 << (self.bits - 1)) - 1 if self.bits > 1 else 1
        turned = torch.where(sign < 0, -self.integers.clamp(min=-most), self.integers)
        self.integers = torch.where(sign == 0, 0, turned).to(torch.int8)
        # A scale of 0 is none. Biases of such an output are whole steps of it, too: the finer, the better.
        self.scale = torch.where(factors == 0, self.scale, self.scale * factors.abs())

    @torch.no_grad()
    def coarsen(self, least: Tensor) -> None:
        """Where a scale is below the least of its output, that one, and the integers that are nearest then."""
        if self.integers is None or self.scale is None or self.is_grouped:
            return
        least = least.to(self.scale.device, torch.float32)
        scale = torch.maximum(self.scale, least.amax() if self.axis is None else least)
        factors = along_axis(self.scale.double() / scale.double(), self.integers, self.axis)
        self.integers, self.scale = torch.round(self.integers * factors).to(torch.int8), scale

    @property
    def scale_of_outputs(self) -> Tensor | None:
        """One each, or one for all; None where the weight is in float, or its outputs have several."""
        return None if self.is_grouped else self.scale

    def forward(self, weight: Tensor | None = None, folded: Tensor | None = None) -> Tensor:
        """The weight."""
        if self.values is not None:
            return self.values
        assert self.integers is not None
        assert self.scale is not None
        if is_lowering():
            result = lowered_weight(self.integers, self.scale, self.zero_point, self.axis, self.dtype)
        else:
            result = self.integers.to(self.dtype) * along_axis(self.scale, self.integers, self.axis).to(self.dtype)
        if self.is_grouped:
            result = result.unflatten(0, (self.num_outputs, -1)).flatten(1, 2)
        return self.layout.restored(result) if self.in_rows else result

    def extra_repr(self) -> str:
        if self.integers is None or self.scale is None:
            return "float"
        return f"{self.bits} bit, {self.scale.numel()} scales"
