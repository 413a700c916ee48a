# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolutions for tests: weights, arguments, what is right in float64, and how far sums may be off."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxslim.kernels.block_layout import BlockSizes, pack_blocks, unpack_blocks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution whose weight lacks a share ``ratio`` of its blocks."""

    num_out: int
    cin: int = 32
    cout: int = 64
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ratio: float = 0.0
    has_bias: bool = True
    relu: bool = False
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the kernels are told by name."""
        names = ("num_out", "cout", "kernel_size", "stride", "padding", "dilation", "relu")
        return {name: getattr(self, name) for name in names}

    def numbers(self, cin: tuple[int, ...] = ()) -> tuple:
        """What the raw operators are told behind their tensors."""
        lists = (list(value) for value in (self.kernel_size, self.stride, self.padding, self.dilation))
        return self.num_out, self.cout, *cin, *lists, self.relu

    def fits(self, x: Tensor) -> bool:
        """Whether an input (batch, height, width, channels) is as large as the kernel."""
        top, left, bottom, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return x.shape[1] + top + bottom >= reach[0] and x.shape[2] + left + right >= reach[1] and x.shape[3] > 0

    def weight(self, num_in: int) -> Tensor:
        """Float64, no 0 but in the blocks that are gone."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_out, num_in, *self.kernel_size)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).float().double()
        over = (-(-self.num_out // self.cout), -(-num_in // self.cin), *self.kernel_size)
        kept = torch.rand(over, generator=generator) >= self.ratio
        kept = kept.repeat_interleave(self.cout, 0).repeat_interleave(self.cin, 1)[: self.num_out, :num_in]
        return torch.where(kept, torch.where(weight == 0, 1.0, weight), 0.0)

    def steps(self, num_in: int) -> Tensor:
        """The weight in int8, of all values that it can have."""
        weight = self.weight(num_in)
        whole = (weight * 50).round().clamp(-128, 127)
        return torch.where((weight != 0) & (whole == 0), 1, whole).to(torch.int8)

    def bias(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        values = torch.randn(self.num_out, generator=generator)
        return values if self.has_bias else None


# Whole panels and not, tails of channels, filters and blocks, several parts of a sum, all blocks gone.
CASES = (
    Case(num_out=5),
    Case(
        num_out=20, cin=3, cout=17, kernel_size=(2, 3), stride=(2, 1), padding=(1, 0, 2, 3), dilation=(1, 2), ratio=0.5
    ),
    Case(num_out=70, kernel_size=(3, 3), padding=(1, 1, 1, 1), ratio=0.5, relu=True),
    Case(num_out=64, cout=32, stride=(1, 2), relu=True),
    Case(num_out=33, cin=8, cout=16, kernel_size=(1, 2), padding=(0, 1, 0, 1), ratio=1.0, has_bias=False),
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Tensor]:
    """A random convolution and a float64 input (batch, height, width, channels) for it, of numbers of float32."""
    whole = draw(st.booleans())
    num_in = 32 * draw(st.integers(1, 4)) if whole else draw(st.integers(1, 90))
    cin, cout = (32, 64) if draw(st.booleans()) else (draw(st.integers(1, 40)), draw(st.integers(1, 90)))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    case = Case(
        num_out=64 * draw(st.integers(1, 3)) if whole else draw(st.integers(1, 150)), cin=cin, cout=cout,
        kernel_size=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))), padding=padding,
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        ratio=draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])), has_bias=draw(st.booleans()), relu=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    reach = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel_size, strict=True)]
    least = [max(0, reach[0] - padding[0] - padding[2]), max(0, reach[1] - padding[1] - padding[3])]
    shape = (draw(st.integers(0, 3)), *(draw(st.integers(side, side + 14)) for side in least), num_in)
    generator = torch.Generator().manual_seed(case.seed + 2)
    return case, torch.randn(shape, generator=generator).double()


def convolved(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution by torch; layouts as those of the kernels."""
    top, left, bottom, right = case.padding
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    output = F.conv2d(padded, weight, bias, case.stride, 0, case.dilation).permute(0, 2, 3, 1)
    return output.relu() if case.relu else output


def allowed_error(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How far a sum in float32, in any order, may lie from the exact one; and what rounding to the dtype of x adds.

    A term is rounded once as a product and once in each sum that it is part of: of n terms at most n + 1 times, by a
    factor of 1 +- u each. Tensor cores cut where others round, which doubles u.
    """
    plain, dtype = Case(**{**vars(case), "relu": False}), x.dtype
    exact = [None if t is None else t.double() for t in (x, weight, bias)]
    sizes = convolved(plain, *(None if t is None else t.abs() for t in exact))
    rounded, unit = weight[0].numel() + 2, 2.0 ** (-24 if dtype == torch.float32 else -23)
    bound = sizes * (rounded * unit / (1 - rounded * unit)) + rounded * torch.finfo(torch.float32).tiny
    if dtype == torch.float32:
        return bound
    return bound + torch.finfo(dtype).eps * (convolved(plain, *exact).abs() + bound) + torch.finfo(dtype).tiny


def image_of(x: Tensor) -> Tensor:
    """A tensor of any shape as (batch, height, width, channels)."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(3)


def _some_cases(x: Tensor) -> Iterator[Case]:
    for case in CASES[:1] if x.shape[3] > 1000 else CASES:
        # A skipped block would hide NaN and infinity, that the reference shows.
        case = case if x.isfinite().all() else Case(**{**vars(case), "ratio": 0.0})
        if case.fits(x):
            yield case


def float_samples(x: Tensor) -> Iterator[tuple]:
    """Arguments of block_sparse_conv2d, in a dtype that its kernels take."""
    dtype = torch.bfloat16 if x.device.type == "cuda" else torch.float32
    image = image_of(x).to(dtype)
    for case in _some_cases(image):
        packed = pack_blocks(case.weight(image.shape[3]).to(dtype), case.cin, case.cout)
        bias = case.bias()
        tensors = (*packed, None if bias is None else bias.to(dtype))
        yield image, *(None if t is None else t.to(x.device) for t in tensors), *case.numbers()


def float_bound(arguments: tuple) -> Tensor:
    """Of the difference of two right results."""
    x, *packed, bias = arguments[:5]
    case = next(case for case in CASES if case.numbers() == arguments[5:])
    shape = (case.num_out, x.shape[3], *case.kernel_size)
    weight = unpack_blocks(*packed, BlockSizes.of(shape, packed[0].shape[2], case.cout)).reshape(shape)
    return 2 * allowed_error(case, x, weight, bias)


# Quantized to bytes of any kind: (zero point, lowest, highest).
GRIDS = (
    (128, 0, 255),
    (0, 0, 255),
    (255, 0, 255),
    (0, -128, 127),
    (-128, -128, 127),
    (127, 0, 127),
    (0, 0, 127),
    (3, -8, 7),
)


def int8_arguments(case: Case, x: Tensor, grid: tuple[int, int, int]) -> tuple:
    """Those of the raw operator, up to the bias; the scale lets the grid be left on both sides."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    packed = pack_blocks(case.steps(x.shape[3]), case.cin, case.cout)
    scale, factor = torch.tensor([6.0 / (grid[2] - grid[1])]), torch.rand(case.num_out, generator=generator) + 0.01
    return x, scale, *grid, *packed, factor, case.bias()


def sums_fit(case: Case, num_in: int, grid: tuple[int, int, int]) -> bool:
    """Whether 32 bits hold any sum."""
    farthest = max(grid[0] - grid[1], grid[2] - grid[0])
    return num_in * math.prod(case.kernel_size) * farthest * 128 < 2**31


def int8_samples(x: Tensor) -> Iterator[tuple]:
    """Arguments of block_sparse_conv2d_int8."""
    image = image_of(x).float()
    for i, case in enumerate(_some_cases(image)):
        for grid in (GRIDS[i], GRIDS[-1 - i]):
            if sums_fit(case, image.shape[3], grid):
                tensors = int8_arguments(case, image, grid)
                moved = (t.to(x.device) if isinstance(t, Tensor) else t for t in tensors)
                yield *moved, *case.numbers((min(case.cin, image.shape[3]),))
