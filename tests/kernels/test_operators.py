# SPDX-License-Identifier: Apache-2.0
"""Every operator against its reference: values, layouts, dtypes, NaN, the dispatcher's own checks."""

import pytest
import torch
from hypothesis import assume, given, settings

from fxslim import kernels
from tests.kernels.op_table import OPERATORS, Operator
from tests.strategies import DTYPES, LAYOUTS, lay_out, tensors

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)

# Big enough for several blocks, pieces and threads; odd enough to leave tails everywhere.
BIG_SHAPES = [(3, 70_001), (5, 67, 13, 29), (2, 3, 211, 97), (600, 257), (2, 40, 6, 7, 9)]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def assert_same(operator: Operator, arguments: tuple) -> None:
    """Bit for bit (NaN equal to NaN, and -0.0 unlike 0.0), sums to their bound; and the same strides."""
    for i, (got, want) in enumerate(
        zip(as_tuple(operator.op(*arguments)), as_tuple(operator.reference(*arguments)), strict=True)
    ):
        note = f"{operator.name} output {i}, arguments {arguments[1:]}"
        assert got.dtype == want.dtype, note
        assert got.shape == want.shape, note
        if want.numel() > 1 and 1 not in want.shape:
            assert got.stride() == want.stride(), note
        got, want = got.cpu(), want.cpu()
        if operator.bound is not None:
            bound = operator.bound(arguments).cpu()
            close = ((got - want).abs() <= bound) & bound.isfinite()
            assert torch.all(close | (got == want) | (got.isnan() & want.isnan())), note
        elif i in operator.sums:
            finite = torch.nan_to_num(want, nan=3.0)
            ulp = torch.nextafter(finite.abs(), torch.full_like(finite, torch.inf)) - finite.abs()
            # Sums are made in float64 of at most numel terms, each at most 256 times the largest gradient.
            grads = torch.nan_to_num(arguments[0].double(), posinf=0, neginf=0)
            largest = grads.abs().max().item() if grads.numel() else 0.0
            slack = torch.finfo(torch.float64).eps * grads.numel() * 256 * largest
            close = (got - want).abs() <= ulp + slack
            assert torch.all(close | (got == want) | (got.isnan() & want.isnan())), note
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=note)
            if got.is_floating_point():
                assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(want)[~want.isnan()]), note


@every_operator
@given(x=tensors())
def test_equals_its_reference_on_random_tensors(operator: Operator, x: torch.Tensor) -> None:
    for arguments in operator.samples(x):
        assert_same(operator, arguments)


@every_operator
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_reference_on_big_tensors(operator, shape, dtype, device) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).to(device)
    for layout in ("contiguous", "channels_last"):
        for arguments in list(operator.samples(lay_out(x, layout)))[:14]:
            assert_same(operator, arguments)


@every_operator
def test_result_does_not_depend_on_threads(operator: Operator) -> None:
    if operator.bound is not None and kernels.implementation(operator.name, "cpu")[0] == "reference":
        pytest.skip("torch's own convolution depends on them")
    x = torch.randn(5, 67, 13, 29)
    threads = torch.get_num_threads()
    for arguments in operator.samples(x):
        try:
            torch.set_num_threads(1)
            one = as_tuple(operator.op(*arguments))
            torch.set_num_threads(3)
            three = as_tuple(operator.op(*arguments))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@every_operator
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=3)
@given(x=tensors(min_dims=1, max_side=5, special=False))
def test_opcheck(operator: Operator, layout: str, x: torch.Tensor, device) -> None:
    # opcheck's own copying of inputs fails on empty tensors.
    assume(x.numel() > 0)
    x = lay_out(x, layout).to(device)
    for arguments in list(operator.samples(x))[:6]:
        torch.library.opcheck(operator.op, arguments)


@every_operator
def test_opcheck_with_gradients(operator: Operator, device) -> None:
    for layout in LAYOUTS:
        x = lay_out(torch.randn(3, 5, 4, 6, device=device), layout).requires_grad_()
        for arguments in list(operator.samples(x))[:4]:
            utils = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(operator.op, arguments, test_utils=utils)


@every_operator
def test_wide_layouts_that_overlap_or_repeat(operator: Operator, device) -> None:
    x = torch.randn(1, 6, 1, 5, device=device)
    for odd in (x.expand(4, 6, 3, 5), torch.randn(40, device=device).as_strided((8, 8), (4, 1))):
        for arguments in operator.samples(odd):
            assert_same(operator, arguments)


@every_operator
def test_meta_tensors_give_shapes(operator: Operator) -> None:
    x = torch.randn(3, 4, 5, 6)
    for arguments in list(operator.samples(x))[:5]:
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        for real, meta in zip(as_tuple(operator.op(*arguments)), as_tuple(operator.op(*on_meta)), strict=True):
            assert meta.device.type == "meta"
            assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())
