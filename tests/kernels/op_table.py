# SPDX-License-Identifier: Apache-2.0
"""The one table of operators that every operator test walks: its reference, sample arguments, tolerances."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxslim import kernels
from tests.kernels.block_sparse_cases import float_bound, float_samples, int8_samples


def _reference(module: str, name: str = "_reference") -> Callable:
    return getattr(importlib.import_module(f"fxslim.kernels.{module}"), name)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """``samples(x)`` yields argument tuples of the raw operator for an input x."""

    name: str
    reference: Callable
    samples: Callable[[Tensor], Iterator[tuple]]
    # Outputs that are sums: equal to 1 ulp of their dtype, not bit for bit.
    sums: tuple[int, ...] = ()
    # The largest difference of two right results for such arguments, where that is not a matter of one ulp.
    bound: Callable[[tuple], Tensor] | None = None

    @property
    def op(self):
        return getattr(torch.ops.fxslim, self.name).default


def _parameters(x: Tensor, axis: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = 1 if axis is None else x.shape[axis]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.rand(count, generator=generator, dtype=dtype) * 0.3 + 0.01
    zero_point = torch.randint(-3, 4, (count,), generator=generator, dtype=torch.int32)
    return scale.to(x.device), zero_point.to(x.device)


def _axes(x: Tensor) -> list[int | None]:
    return [None, *range(x.dim())]


def _orders(x: Tensor) -> list[bool]:
    return [False, True] if x.dim() in (4, 5) else [False]


def _fake_quantize(x: Tensor) -> Iterator[tuple]:
    for axis in _axes(x):
        for channels_last in _orders(x):
            for low, high in ((-8, 7), (-32768, 32767)):
                yield x, *_parameters(x, axis), low, high, axis, channels_last, True
    yield x, *_parameters(x, None), -8, 7, None, False, False


# fp8_e4m3, fp8_e5m2, fp4_e2m1, and float16 for the most mantissa bits.
_FLOAT_FORMATS = ((3, -6, 448.0), (2, -14, 57344.0), (1, 0, 6.0), (10, -14, 65504.0))


def _fake_quantize_float(x: Tensor) -> Iterator[tuple]:
    for axis in _axes(x):
        for channels_last in _orders(x):
            for form in _FLOAT_FORMATS:
                yield x, _parameters(x, axis)[0], *form, axis, channels_last, True
    yield x, _parameters(x, None)[0], 1, 0, 6.0, None, False, False


def _mask_gradient(x: Tensor) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), generator=generator, dtype=torch.uint8)
    for channels_last in _orders(x):
        yield x, mask.to(x.device), channels_last


def _observe_min_max(x: Tensor) -> Iterator[tuple]:
    if x.numel() > 0:
        for axis in _axes(x):
            yield from ((x, axis, channels_last) for channels_last in _orders(x))


def _observe_histogram(x: Tensor) -> Iterator[tuple]:
    if x.numel() == 0:
        return
    # Aligned and not, above 0, below 0, one bin, and ranges that nothing can be counted in.
    ranges = (
        (-4.0, 4.0, 2048),
        (-0.3, 1.1, 7),
        (0.25, 0.75, 64),
        (-1.7, -0.2, 100),
        (-1e300, 1e300, 3),
        (0.0, 1e-3, 1),
    )
    for low, high, bins in (*ranges, (1.0, 1.0, 5), (-torch.inf, torch.nan, 5), (1e300, 2e300, 5)):
        for channels_last in _orders(x):
            ends = (torch.tensor([end], dtype=torch.float64, device=x.device) for end in (low, high))
            yield x, *ends, bins, channels_last


def _quantization_errors(x: Tensor) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(x.numel())

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    even = torch.arange(-300, 20, dtype=torch.float64) / 64
    cut = even.clone()
    cut[[0, -1]] = torch.tensor([-4.68, 0.2951], dtype=torch.float64)
    uneven = random(60).cumsum(0) + 1e4
    # The last: bins of no width among them.
    for edges in (even, cut, uneven, torch.tensor([-0.5, 2.0]), torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])):
        counts = torch.randint(0, 5, (len(edges) - 1,), generator=generator) * 1000
        for num_points in (1, 2, 16, 255, 65536):
            first = edges[0] + (random(9) - 0.3) * (edges[-1] - edges[0])
            step = (random(9) + 1e-3) * (edges[-1] - edges[0]) / num_points
            yield *(part.to(x.device) for part in (edges.double(), counts, first.double(), step.double())), num_points


def _error_bound(arguments: tuple) -> Tensor:
    """Digits that are lost where sums of opposite signs nearly meet."""
    edges, counts, first, step, num_points = arguments
    last = first + step * (num_points - 1)
    reach = torch.cat([edges[[0, -1]], first, last]).aminmax()
    return 1e-12 * counts.sum() * (reach.max - reach.min) ** 2 + torch.zeros_like(first)


def _observe_fake_quantize(x: Tensor) -> Iterator[tuple]:
    for axis in _axes(x):
        low = -_parameters(x, axis)[0]
        for averaging, symmetric in ((1.0, True), (0.1, False), (None, False), (0.5, True)):
            for old in (low, torch.full_like(low, torch.inf)):
                for channels_last in _orders(x):
                    yield x, old, -old, -8, 7, averaging, symmetric, axis, channels_last, averaging != 1.0
        yield x, low, -low, 0, 255, 1.0, False, axis, False, True


def _clips(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor([-0.7], dtype=dtype).to(x.device), torch.tensor([1.1], dtype=dtype).to(x.device)


def _clipped(x: Tensor) -> Iterator[tuple]:
    for channels_last in _orders(x):
        yield x, *_clips(x), -128, 127, channels_last
        yield x, *_clips(x), 0, 3, channels_last


def _clipped_backward(x: Tensor) -> Iterator[tuple]:
    yield from ((x.flip(0) if x.dim() else x, *arguments) for arguments in _clipped(x))


def _learned(x: Tensor) -> Iterator[tuple]:
    for axis in _axes(x):
        for channels_last in _orders(x):
            yield x, *_parameters(x, axis), -8, 7, 0.25 if channels_last else None, axis, channels_last


def _learned_backward(x: Tensor) -> Iterator[tuple]:
    yield from ((x.flip(0) if x.dim() else x, *arguments) for arguments in _learned(x))


def _nm_mask(x: Tensor) -> Iterator[tuple]:
    for axis in range(x.dim()):
        for n, m in ((1, 1), (2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (40, 50)):
            yield from ((x, n, m, axis, channels_last) for channels_last in _orders(x))


def _block_mask(x: Tensor) -> Iterator[tuple]:
    if not 2 <= x.dim() <= 5:
        return
    for cin, cout, per_position in ((32, 64, True), (4, 1, False), (2, 3, True), (1, 1, True), (3, 2, False)):
        blocks = -(-x.shape[0] // cout) * -(-x.shape[1] // cin)
        blocks *= x.shape[2:].numel() if per_position else x.numel() > 0
        for num_removed in (blocks // 2, max(0, blocks - 1)):
            yield from ((x, num_removed, cin, cout, per_position, channels_last) for channels_last in _orders(x))


OPERATORS = [
    Operator(name="fake_quantize", reference=_reference("fake_quantization"), samples=_fake_quantize),
    Operator(name="fake_quantize_float", reference=_reference("float_fake_quantization"), samples=_fake_quantize_float),
    Operator(name="mask_gradient", reference=_reference("clip_masks"), samples=_mask_gradient),
    Operator(
        name="observe_min_max", reference=_reference("observation", "min_max_reference"), samples=_observe_min_max
    ),
    Operator(
        name="quantization_errors",
        reference=_reference("histogram_errors"),
        samples=_quantization_errors,
        bound=_error_bound,
    ),
    Operator(name="observe_histogram", reference=_reference("histogram_observation"), samples=_observe_histogram),
    Operator(
        name="observe_fake_quantize",
        reference=_reference("observed_fake_quantization"),
        samples=_observe_fake_quantize,
    ),
    Operator(name="fake_quantize_clipped", reference=_reference("clipped_fake_quantization"), samples=_clipped),
    Operator(
        name="fake_quantize_clipped_backward",
        reference=_reference("clipped_fake_quantization", "_backward_reference"),
        samples=_clipped_backward,
        sums=(1, 2),
    ),
    Operator(name="fake_quantize_learned", reference=_reference("learned_fake_quantization"), samples=_learned),
    Operator(
        name="fake_quantize_learned_backward",
        reference=_reference("learned_fake_quantization", "_backward_reference"),
        samples=_learned_backward,
        sums=(1,),
    ),
    Operator(name="nm_mask", reference=_reference("nm_masking"), samples=_nm_mask),
    Operator(name="block_mask", reference=_reference("block_masking"), samples=_block_mask),
    Operator(
        name="block_sparse_conv2d",
        reference=_reference("block_sparse_convolution"),
        samples=float_samples,
        bound=float_bound,
    ),
    Operator(
        name="block_sparse_conv2d_int8", reference=_reference("block_sparse_int8_convolution"), samples=int8_samples
    ),
]

assert {operator.name for operator in OPERATORS} == set(kernels.operator_names())
