# SPDX-License-Identifier: Apache-2.0
"""What deployed layers share that compute in integers: inputs as bytes, a packed weight that is made when needed."""

from typing import Any

from torch import Tensor, nn

from fxslim.nn.byte_products import IN_HALVES, NONE, PackedWeight, as_bytes, can_run, kernel_for
from fxslim.nn.deployed_layers import DeployedLayer

_PACKED = "_packed"


class Int8Layer(DeployedLayer):
    """Mixed into a layer whose inputs and weights are bytes. Where kernels can't run it computes in floating point."""

    @property
    def kernel(self) -> str:
        """ "int8", or in two halves where sums would be cut off, or "float" where there is no kernel."""
        return kernel_for(self.weight, self.input_grid) if self.input_grid is not None else NONE

    def computed(self, x: Tensor, quantizer: nn.Module | None = None) -> Tensor:
        packed = self._packed_weight() if can_run(x) else None
        grid: Any = quantizer or self.input_quantizer
        if packed is None or self.input_grid is None:
            return super().computed(x, quantizer)
        least, most = self.input_grid
        scale, zero_point = grid.scale, int(grid.zero_point) - least
        integers = as_bytes(x, scale, zero_point, most - least)
        return self.integer_product(integers, float(scale), zero_point, packed).to(x.dtype)

    def integer_product(self, x: Tensor, scale: float, zero_point: int, packed: PackedWeight) -> Tensor:
        """The layer's arithmetic on integers."""
        raise NotImplementedError

    def _packed_weight(self) -> PackedWeight | None:
        packed = self.__dict__.get(_PACKED)
        if packed is None or not packed.is_of(self.weight, self.bias):
            kernel = self.kernel
            if kernel == NONE:
                return None
            packed = PackedWeight(self.weight, self.bias, kernel == IN_HALVES)
            self.__dict__[_PACKED] = packed
        return packed

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are opaque: copies make their own.
        return {name: value for name, value in self.__dict__.items() if name != _PACKED}
