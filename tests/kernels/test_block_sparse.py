# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolutions against F.conv2d in float64, and against exact sums of whole numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxslim import kernels
from fxslim.kernels.block_layout import BlockSizes, pack_blocks, unpack_blocks
from tests.kernels.block_sparse_cases import GRIDS, Case, allowed_error, cases, convolved, int8_arguments, sums_fit
from tests.strategies import LAYOUTS, lay_out

ROOT = Path(__file__).resolve().parents[2]
NATIVE = kernels.implementation("block_sparse_conv2d", "cpu")[0] == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="no native kernels here")


def float_result(case: Case, x: Tensor) -> Tensor:
    packed = pack_blocks(case.weight(x.shape[3]).to(x.dtype), case.cin, case.cout)
    bias = case.bias()
    tensors = (x, *packed, None if bias is None else bias.to(x.dtype))
    on_device = (None if t is None else t.to(x.device) for t in tensors)
    return kernels.block_sparse_conv2d(*on_device, num_in=x.shape[3], **case.settings)


def assert_right(case: Case, x: Tensor, got: Tensor) -> None:
    """Within what rounding in the dtype of x explains."""
    weight, bias = case.weight(x.shape[3]).to(x.dtype), case.bias()
    bias = None if bias is None else bias.to(x.dtype)
    want = convolved(case, x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert torch.all((got - want).abs() <= allowed_error(case, x, weight, bias))


def int8_want(case: Case, x: Tensor, arguments: tuple) -> Tensor:
    """Sums of integers, then two roundings in float32: what the operator promises."""
    _, scale, zero_point, low, high, *_, factor, bias = arguments
    steps = (torch.round(x / scale) + zero_point).clamp(low, high) - zero_point
    plain = Case(**{**vars(case), "relu": False})
    sums = convolved(plain, steps.double(), case.steps(x.shape[3]).double(), None)
    output = sums.float() * factor + (0 if bias is None else bias)
    return output.relu() if case.relu else output


def int8_result(case: Case, x: Tensor, arguments: tuple) -> Tensor:
    return kernels.block_sparse_conv2d_int8(*arguments, num_in=x.shape[3], cin=case.cin, **case.settings)


# What the kernels take.
DTYPES = {"cpu": [torch.float32, torch.bfloat16, torch.float16], "cuda": [torch.bfloat16, torch.float16]}


@given(drawn=cases(), layout=st.sampled_from(LAYOUTS), data=st.data())
def test_equals_conv2d(drawn: tuple[Case, Tensor], layout: str, data: st.DataObject, device) -> None:
    case, x = drawn
    x = lay_out(x.to(device, data.draw(st.sampled_from(DTYPES[device.type]))), layout)
    assert_right(case, x.cpu(), float_result(case, x).cpu())


@given(drawn=cases(), grid=st.sampled_from(GRIDS), layout=st.sampled_from(LAYOUTS))
def test_bytes_give_exact_sums(drawn: tuple[Case, Tensor], grid: tuple[int, int, int], layout: str) -> None:
    case, x = drawn
    x = lay_out(x.float(), layout)
    arguments = int8_arguments(case, x, grid)
    assert sums_fit(case, x.shape[3], grid)
    got = int8_result(case, x, arguments)
    assert got.is_contiguous()
    assert torch.equal(got, int8_want(case, x, arguments))


@native_only
@settings(max_examples=15)
@given(drawn=cases(), grid=st.sampled_from(GRIDS))
def test_threads_change_nothing(drawn: tuple[Case, Tensor], grid: tuple[int, int, int]) -> None:
    case, x = drawn
    x = x.float()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((float_result(case, x), int8_result(case, x, int8_arguments(case, x, grid))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@given(rows=st.integers(0, 300), num_in=st.integers(1, 300), num_out=st.integers(1, 150), data=st.data())
def test_rows_of_a_linear_layer_are_pixels(rows: int, num_in: int, num_out: int, data: st.DataObject) -> None:
    case = Case(num_out=num_out, ratio=data.draw(st.sampled_from([0.0, 0.5, 1.0])), seed=data.draw(st.integers(0, 99)))
    x = torch.randn(rows, num_in, generator=torch.Generator().manual_seed(case.seed))
    got = float_result(case, x[:, None, None])[:, 0, 0]
    weight, bias = case.weight(num_in), case.bias()
    want = F.linear(x.double(), weight[:, :, 0, 0], bias.double())
    limit = allowed_error(case, x[:, None, None], weight.float(), bias)[:, 0, 0]
    assert torch.all((got - want).abs() <= limit)


@given(drawn=cases())
def test_packing_loses_nothing(drawn: tuple[Case, Tensor]) -> None:
    case, x = drawn
    for weight in (case.weight(x.shape[3]), case.steps(x.shape[3])):
        blocks, places, starts = pack_blocks(weight, case.cin, case.cout)
        sizes = BlockSizes.of(tuple(weight.shape), case.cin, case.cout)
        assert torch.equal(unpack_blocks(blocks, places, starts, sizes).reshape(weight.shape), weight)
        assert (blocks != 0).flatten(1).any(1).all()


def stored(case: Case, num_in: int, sign: int = 0) -> Tensor:
    """1 where a weight is not 0, or has this sign."""
    weight = case.weight(num_in)
    return ((weight != 0) if sign == 0 else (weight * sign > 0)).double()


@given(drawn=cases(), data=st.data())
def test_nan_and_infinity_go_where_stored_blocks_read_them(drawn: tuple[Case, Tensor], data: st.DataObject) -> None:
    case, x = drawn
    x = x.float()
    generator = torch.Generator().manual_seed(case.seed)
    odd = torch.rand(x.shape, generator=generator) < data.draw(st.sampled_from([1e-3, 0.03]))
    kinds = torch.tensor(data.draw(st.sampled_from([[torch.nan], [torch.inf, -torch.inf], [torch.inf, torch.nan]])))
    x = torch.where(odd, kinds[torch.randint(len(kinds), x.shape, generator=generator)], x)
    plain = Case(**{**vars(case), "relu": False})
    num_in = x.shape[3]
    above, below = ((x == torch.inf).double(), (x == -torch.inf).double())

    def reads(where: Tensor, sign: int) -> Tensor:
        return convolved(plain, where, stored(case, num_in, sign), None) > 0.5

    up, down = reads(above, 1) | reads(below, -1), reads(above, -1) | reads(below, 1)
    is_nan = reads(x.isnan().double(), 0) | (up & down)
    got = float_result(case, x)
    if NATIVE:
        assert torch.equal(got.isnan(), is_nan)
        assert torch.equal(got == torch.inf, up & ~is_nan)
        assert torch.equal(got == -torch.inf, down & ~is_nan & (not case.relu))
        finite = ~(is_nan | up | down)
        clean = float_result(case, torch.where(odd, 0, x))
        assert torch.equal(got[finite], clean[finite])
    else:
        assert torch.all(got.isnan() | ~is_nan)


@given(drawn=cases(), grid=st.sampled_from(GRIDS))
def test_nan_becomes_the_lowest_step_and_infinity_the_last(drawn: tuple[Case, Tensor], grid: tuple) -> None:
    case, x = drawn
    x = x.float()
    odd = torch.rand(x.shape, generator=torch.Generator().manual_seed(case.seed)) < 0.1
    scale = int8_arguments(case, x, grid)[1]
    for value, step in ((torch.nan, grid[1]), (torch.inf, grid[2]), (-torch.inf, grid[1]), (3e38, grid[2])):
        odd_x, same = torch.where(odd, value, x), torch.where(odd, (step - grid[0]) * scale, x)
        got = int8_result(case, odd_x, int8_arguments(case, odd_x, grid))
        assert torch.equal(got, int8_want(case, same, int8_arguments(case, same, grid)))


# One that has everything, several ranges of pixels and parts of a sum; small ones with tails.
FORCED = (
    (Case(num_out=128, kernel_size=(3, 3), padding=(1, 1, 1, 1), ratio=0.4, relu=True), (2, 13, 11, 96)),
    (Case(num_out=150, cin=31, cout=47, kernel_size=(2, 3), stride=(2, 1), ratio=0.3), (1, 9, 8, 90)),
    (Case(num_out=3, cin=5, cout=2, padding=(2, 0, 1, 3), ratio=0.5, relu=True, has_bias=False), (3, 5, 7, 13)),
    (Case(num_out=64, kernel_size=(5, 1), dilation=(2, 1)), (1, 10, 97, 64)),
)
SAVE = """
import sys, torch
from tests.kernels import test_block_sparse as tests
torch.save(tests.forced_results(), sys.argv[1])
"""


def forced_results() -> list[tuple[Tensor, list[Tensor]]]:
    found = []
    for case, shape in FORCED:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        found.append((float_result(case, x), [int8_result(case, x, int8_arguments(case, x, grid)) for grid in GRIDS]))
    return found


@native_only
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512vnni"])
def test_every_instruction_set(level: str, tmp_path: Path) -> None:
    """What this CPU lacks falls back to its best."""
    path = tmp_path / "results.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FXSLIM_CPU": level, "FXSLIM_KERNELS": "native"}
    subprocess.run([sys.executable, "-c", SAVE, str(path)], env=environment, cwd=ROOT, check=True)
    for (case, shape), (got, of_bytes) in zip(FORCED, torch.load(path), strict=True):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        assert_right(case, x, got)
        for grid, result in zip(GRIDS, of_bytes, strict=True):
            assert torch.equal(result, int8_want(case, x, int8_arguments(case, x, grid)))


@given(drawn=cases())
@settings(max_examples=10)
def test_a_dtype_without_a_kernel_is_computed_densely(drawn: tuple[Case, Tensor]) -> None:
    case, x = drawn
    x = x.double()
    got = float_result(case, x)
    want = convolved(case, x, case.weight(x.shape[3]), None if case.bias() is None else case.bias().double())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert got.is_contiguous()
