# SPDX-License-Identifier: Apache-2.0
"""The convolutions that block-sparse kernels are measured on: those of ResNet-50 and VGG-16 at 224 pixels."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from fxslim import kernels

MODELS = ("resnet50", "vgg16")
LEAST_CHANNELS = 64


@dataclass(frozen=True, kw_only=True, order=True)
class Layer:
    """A convolution, and the size of its input."""

    num_in: int
    num_out: int
    size: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.num_in} to {self.num_out}, {self.kernel}x{self.kernel} /{self.stride}, {self.size} pixels"

    @property
    def padding(self) -> int:
        """Those of these models keep the size."""
        return self.kernel // 2

    def macs(self, batch: int) -> int:
        """Multiply-adds of the dense layer."""
        side = (self.size - 1) // self.stride + 1
        return batch * side * side * self.num_in * self.num_out * self.kernel**2

    def weight(self, ratio: float) -> Tensor:
        """Random numbers without their smallest Cin32Cout64 blocks."""
        weight = torch.randn(self.num_out, self.num_in, self.kernel, self.kernel)
        weight *= (self.num_in * self.kernel**2) ** -0.5
        return weight if ratio == 0 else torch.where(kernels.block_mask(weight, ratio), weight, 0)

    def input(self, batch: int) -> Tensor:
        """Random numbers, channels last."""
        x = torch.randn(batch, self.num_in, self.size, self.size)
        return x.contiguous(memory_format=torch.channels_last)


def layers_of(name: str, least: int = LEAST_CHANNELS) -> Counter[Layer]:
    """The layers of a torchvision model that read enough channels, and how often each is there."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        model = get_model(name, weights=None).eval()

    def see(layer: nn.Conv2d, args: tuple[Tensor], _: Tensor) -> None:
        if layer.in_channels >= least:
            found[
                Layer(
                    num_in=layer.in_channels, num_out=layer.out_channels, size=args[0].shape[-1],
                    kernel=layer.kernel_size[0], stride=layer.stride[0],
                )
            ] += 1  # fmt: skip

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return found


def smaller(layer: Layer, by: int) -> Layer:
    """The same layer with a smaller input, for a quick look."""
    return replace(layer, size=max(layer.size // by, 7))
