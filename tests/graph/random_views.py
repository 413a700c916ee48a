# SPDX-License-Identifier: Apache-2.0
"""Steps of random networks that move channels: views, slices, splits, shuffles, permutations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class View(nn.Module):
    """``channels`` says how many come out."""

    def __init__(self, c: int, channels: int) -> None:
        super().__init__()
        self.width, self.channels = c, channels


class Shuffle(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c)
        self.rows = next(g for g in (4, 3, 2, 1) if c % g == 0)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.rows, c // self.rows, h, w).transpose(1, 2).reshape(b, -1, h, w)


class HalfSlice(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c // 2 * 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.width % 2:
            return x[:, 1:]
        half = x.size(1) // 2
        return torch.cat([x[:, half:].relu(), x[:, :half]], 1)


class LiteralSlice(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c - 2)
        self.forward = (lambda x: x[:, 2:]) if c % 2 else (lambda x: x[:, :-2])  # type: ignore[assignment]


class UnevenSplit(View):
    """Sizes from attributes of the module."""

    def __init__(self, c: int) -> None:
        super().__init__(c, c)
        self.first, self.parts = 2, (c - 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.width % 2:
            a, b = torch.split(x, self.parts, dim=1)
        else:
            a, b = x.split([self.first, x.size(1) - self.first], 1)
        return torch.cat([b, a.sigmoid()], 1)


class EqualSplit(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, x.shape[1] // 2, dim=1) if self.width % 2 == 0 else (x[:, : self.channels], 1)
        return a * b


class Maxout(View):
    """Neighbours compete: channels 2i and 2i + 1 go together."""

    def __init__(self, c: int) -> None:
        super().__init__(c, c // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        return x.view(b, c // 2, 2, h, w).amax(2) if self.width % 2 == 0 else x[:, : self.channels]


class RowSum(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c // 2 if c % 2 == 0 else c)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, -1)).sum(1) if self.width % 2 == 0 else x


class RowSoftmax(View):
    """Radix attention: softmax between two rows, which are added up."""

    def __init__(self, c: int) -> None:
        super().__init__(c, c // 2 if c % 2 == 0 else c)

    def forward(self, x: Tensor) -> Tensor:
        if self.width % 2:
            return x.softmax(2)
        b, c, h, w = x.shape
        rows = x.view(b, 2, c // 2, h, w)
        return (rows * rows.mean((3, 4), keepdim=True).softmax(1)).sum(1)


class PermutedLinear(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, 12)
        self.linear = nn.Linear(c, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.view(b, c, h * w).transpose(1, 2)
        return self.linear(tokens).permute(0, 2, 1).reshape(b, -1, h, w)


class AttributeView(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).reshape(x.size(0), self.width, x.size(2), -1).sigmoid()


class PixelShuffle(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c // 4 if c % 4 == 0 else c)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pixel_shuffle(x, 2), 2) if self.width % 4 == 0 else x


class PixelUnshuffle(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c * 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)


class Stacked(View):
    def __init__(self, c: int) -> None:
        super().__init__(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(3), x.roll(1, 2)]).mean(0) + x.new_zeros(x.shape[1], 1, 1)


VIEWS: tuple[type[View], ...] = (
    Shuffle, HalfSlice, LiteralSlice, UnevenSplit, EqualSplit, Maxout, RowSum, RowSoftmax, PermutedLinear,
    AttributeView, PixelShuffle, PixelUnshuffle, Stacked,
)  # fmt: skip
