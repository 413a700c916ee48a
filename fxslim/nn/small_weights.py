# SPDX-License-Identifier: Apache-2.0
"""A weight as it is deployed: small integers, or small floating-point numbers, and their scales."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from fxslim.nn.norm_folding import folded_scale
from fxslim.nn.quant_config import WeightQuant
from fxslim.nn.quantizers import WeightQuantizer
from fxslim.patterns.weight_layout import WeightLayout

_INTEGERS = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def storage_of(config: WeightQuant | None) -> str:
    """How the values of such a weight are kept; numbers of 4 bits are two to a byte.

    >>> storage_of(WeightQuant(bits=3)), storage_of(WeightQuant(bits=8, method="dorefa", granularity="tensor"))
    ('int4', 'int16')
    """
    if config is None:
        return "float"
    if config.format != "int":
        # The smaller formats have no number that this one does not have.
        return "fp8_e5m2" if config.format == "fp8_e5m2" else "fp8_e4m3"
    # Values of dorefa are the odd numbers of a grid that is twice as fine.
    bits = {"dorefa": config.bits + 1, "binary": 2}.get(config.method, config.bits)
    return next((f"int{size}" for size in (4, 8, 16) if bits <= size), "int32")


class SmallWeight(nn.Module):
    """``values`` in rows of outputs, and ``scale`` (outputs, groups of inputs); the weight is their product."""

    values: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor, scale: Tensor, storage: str, layout: WeightLayout) -> None:
        super().__init__()
        self.storage, self.layout, self.row_shape = storage, layout, rows.shape
        self.register_buffer("values", self._kept(rows))
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, layer: Any, name: str, layout: WeightLayout) -> Self:
        """A counterpart's weight, masked and on its grid."""
        quantizer = layer._modules.get(f"{name}_quantizer")
        weight = layer.masked(name).detach()
        rows = layout.rows(weight)
        scale = rows.new_ones(rows.shape[0], 1, dtype=torch.promote_types(weight.dtype, torch.float32))
        if quantizer is not None:
            rows, scale = _on_grid(layer, quantizer, weight)
        return cls(rows, scale, storage_of(None if quantizer is None else quantizer.config), layout)

    @property
    def scale_of_outputs(self) -> Tensor | None:
        """One each; None where numbers of 8 bits are not what is multiplied, or an output has several."""
        return self.scale.flatten() if self.is_int8 else None

    def multiply_outputs(self, factors: Tensor) -> None:
        """Each output times its factor, which becomes part of the scale."""
        self.scale = self.scale * factors.to(self.scale.dtype)[:, None]

    def split(self, parts: int) -> list[Self]:
        """Equal parts of the outputs."""
        rows, scales = self.rows().chunk(parts), self.scale.chunk(parts)
        return [
            type(self)(row, scale.clone(), self.storage, self.layout) for row, scale in zip(rows, scales, strict=True)
        ]

    def _kept(self, rows: Tensor) -> Tensor:
        if self.storage in _FLOATS:
            return rows.to(_FLOATS[self.storage])
        if self.storage == "int4":
            return _packed(_whole(rows).to(torch.int8).flatten(1))
        if self.storage in _INTEGERS:
            return _whole(rows).to(_INTEGERS[self.storage])
        return rows.clone()

    @property
    def is_int8(self) -> bool:
        """Whether a product of bytes can read it: whole numbers of 8 bits, one scale for each output."""
        return self.storage in ("int4", "int8") and self.scale.shape[1] == 1

    def rows(self) -> Tensor:
        """The values as (out, in, *kernel), two to a byte no more."""
        if self.storage != "int4":
            return self.values
        return _unpacked(self.values, self.row_shape[1:].numel()).reshape(self.row_shape)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point, in the layout of the layer."""
        return self.layout.restored(self._scaled(self.rows(), self.scale, dtype)).to(dtype)

    def at(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of a table, without making the others."""
        shape = *indices.shape, *self.row_shape[1:]
        # Few devices index numbers of 8 bits that are not whole.
        raw = self.values.view(torch.uint8) if self.storage in _FLOATS else self.values
        found = raw[indices.flatten()].view(self.values.dtype)
        if self.storage == "int4":
            found = _unpacked(found, self.row_shape[1:].numel())
        return self._scaled(found, self.scale[indices.flatten()], dtype).reshape(shape).to(dtype)

    @staticmethod
    def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = values.to(torch.promote_types(dtype, scale.dtype))
        if scale.shape[1] == 1:
            return wide * scale.reshape(-1, *[1] * (values.dim() - 1))
        groups = wide.flatten(1).unflatten(1, (scale.shape[1], -1))
        return (groups * scale[:, :, None]).reshape(values.shape)

    def extra_repr(self) -> str:
        return f"{tuple(self.row_shape)}, {self.storage}"


def _on_grid(layer: Any, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a weight divided by their scales, and the scales."""
    with torch.no_grad():
        norm = layer.__dict__.get("_folded")
        folded = None if norm is None else folded_scale(norm[0])
        on_grid, scale = quantizer.values_and_scale(weight, folded)
        factor = quantizer.folding_factor(folded, weight)
        if scale is None:
            scale = quantizer.grid_of(weight if factor is None else weight * factor)[0]
        scale = scale.detach().to(torch.promote_types(weight.dtype, torch.float32))
        rows = quantizer.layout.rows(on_grid).to(scale.dtype)
        scale = scale.reshape(rows.shape[0], -1) if scale.numel() > 1 else scale.expand(rows.shape[0]).reshape(-1, 1)
        wide = scale.repeat_interleave(rows[0].numel() // scale.shape[1], 1).reshape(rows.shape)
        # A scale of 0 is that of a row of zeros.
        steps = torch.where(wide == 0, 0, rows / wide)
        if factor is not None:
            # The layer's own weight is not scaled as the norm will scale it.
            scale = scale / quantizer.layout.rows(factor.expand(weight.shape)).flatten(1)[:, :1]
        return steps, scale.contiguous().clone()


def _whole(rows: Tensor) -> Tensor:
    return rows.round() if rows.is_floating_point() else rows


def _packed(values: Tensor) -> Tensor:
    """Two numbers of 4 bits to a byte, along rows."""
    if values.shape[1] % 2:
        values = torch.cat([values, values.new_zeros(values.shape[0], 1)], 1)
    nibbles = values.to(torch.uint8) & 15
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpacked(packed: Tensor, columns: int) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :columns]
    return ((nibbles.to(torch.int8) ^ 8) - 8).contiguous()
