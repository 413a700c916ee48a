# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: every message names the argument and its value. Odd ones that are right give right results."""

import pytest
import torch

from fxslim import ConfigError, DtypeError, FxslimError, kernels

X = torch.randn(3, 4)
INF = torch.tensor([torch.inf])
EDGES, COUNTS = torch.arange(4.0), torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: kernels.fake_quantize(X.int(), 0.1, 0, -8, 7), DtypeError, r"x must be float32.*got torch.int32"),
        (lambda: kernels.fake_quantize([1.0], 0.1, 0, -8, 7), DtypeError, "x must be a Tensor, got list"),
        (lambda: kernels.fake_quantize(X.to_sparse(), 0.1, 0, -8, 7), DtypeError, "x must be a dense tensor"),
        (lambda: kernels.fake_quantize(X, 0.0, 0, -8, 7), ConfigError, "scale=0.0 must be a finite number > 0"),
        (lambda: kernels.fake_quantize(X, -0.5, 0, -8, 7), ConfigError, "scale=-0.5 must be"),
        (lambda: kernels.fake_quantize(X, float("nan"), 0, -8, 7), ConfigError, "scale=nan must be"),
        (lambda: kernels.fake_quantize(X, float("inf"), 0, -8, 7), ConfigError, "scale=inf must be"),
        (lambda: kernels.fake_quantize(X, "0.1", 0, -8, 7), DtypeError, "scale must be a number or a Tensor"),
        (lambda: kernels.fake_quantize(X, 0.1, 8, -8, 7), ConfigError, r"zero_point=8 must be in \[-8, 7\]"),
        (lambda: kernels.fake_quantize(X, 0.1, 0.5, -8, 7), ConfigError, "zero_point=0.5 must be a whole number"),
        (lambda: kernels.fake_quantize(X, 0.1, float("nan"), -8, 7), ConfigError, "zero_point=nan must be a whole"),
        (
            lambda: kernels.fake_quantize(X, 0.1, torch.tensor(0.9), -8, 7),
            DtypeError,
            "zero_point has dtype torch.float32",
        ),
        (
            lambda: kernels.fake_quantize(X, 0.1, torch.tensor(2**32 + 3), -8, 7),
            ConfigError,
            "zero_point=65536 must be",
        ),
        (lambda: kernels.fake_quantize(X, 1e300, 0, -8, 7), ConfigError, "scale=1e.300 must be a finite number"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, 7, -8), ConfigError, "quant_min=7 must be below quant_max=-8"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, -8, 7.0), DtypeError, "quant_max must be an int, got 7.0"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, 0, 65536), ConfigError, "quant_max=65536 is outside"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, -60000, 60000), ConfigError, "at most 65536 steps"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, -8, 7, axis=2), ConfigError, r"axis=2 does not exist.*\(3, 4\)"),
        (lambda: kernels.fake_quantize(X, 0.1, 0, -8, 7, axis="0"), DtypeError, "axis must be an int or None"),
        (lambda: kernels.fake_quantize(X[0, 0], 0.1, 0, -8, 7, axis=0), ConfigError, "axis=0 does not exist"),
        (
            lambda: kernels.fake_quantize(X, torch.ones(3), 0, -8, 7, axis=1),
            ConfigError,
            "scale has 3 values, expected 4",
        ),
        (
            lambda: kernels.fake_quantize(X, torch.tensor([1.0, 0.0, 1.0]), 0, -8, 7, axis=0),
            ConfigError,
            r"scale\[1\]=0.0",
        ),
        (
            lambda: kernels.fake_quantize(X, torch.ones(1, device="meta"), 0, -8, 7),
            ConfigError,
            "scale is on meta, the input on cpu",
        ),
        (
            lambda: kernels.fake_quantize(X, torch.ones(1, requires_grad=True), 0, -8, 7),
            ConfigError,
            "use fake_quantize_learned",
        ),
        (
            lambda: kernels.fake_quantize_float(X, 0.1, "fp8_e4m4"),
            ConfigError,
            "unknown format 'fp8_e4m4'; did you mean 'fp8_e4m3'",
        ),
        (lambda: kernels.fake_quantize_float(X, 0.1, 8), DtypeError, "format must be a name, got 8"),
        (lambda: kernels.fake_quantize_float(X.int(), 0.1, "fp4_e2m1"), DtypeError, "x must be float32.*torch.int32"),
        (lambda: kernels.fake_quantize_float(X, 0.0, "fp4_e2m1"), ConfigError, "scale=0.0 must be a finite number > 0"),
        (
            lambda: kernels.fake_quantize_float(X, torch.ones(3), "fp4_e2m1", axis=1),
            ConfigError,
            "scale has 3 values, expected 4",
        ),
        (lambda: kernels.fake_quantize_float(X, 0.1, "fp4_e2m1", axis=2), ConfigError, "axis=2 does not exist"),
        (
            lambda: kernels.fake_quantize_float(X, torch.ones(1, requires_grad=True), "fp8_e4m3"),
            ConfigError,
            r"scale requires grad, which fake_quantize_float does not give: pass scale.detach\(\)",
        ),
        (lambda: kernels.observe_min_max(X[:0]), ConfigError, r"x has shape \(0, 4\): an empty tensor"),
        (lambda: kernels.observe_min_max(X, axis=-3), ConfigError, "axis=-3 does not exist"),
        (lambda: kernels.observe_histogram(X[:0], 0, 1, 4), ConfigError, r"x has shape \(0, 4\): an empty tensor"),
        (lambda: kernels.observe_histogram(X, 0, 1, 0), ConfigError, r"bins=0 must be in \[1, 65536\]"),
        (lambda: kernels.observe_histogram(X, 0, 1, 2.0), DtypeError, "bins must be an int, got 2.0"),
        (lambda: kernels.observe_histogram(X, 1, 1, 4), ConfigError, "low=1, high=1: bins need finite numbers"),
        (lambda: kernels.observe_histogram(X, 0, torch.tensor(torch.inf), 4), ConfigError, "low=0, high=inf: bins"),
        (lambda: kernels.observe_histogram(X, torch.zeros(2), 1, 4), ConfigError, "low has 2 values, expected 1"),
        (lambda: kernels.quantization_errors(X[0], EDGES, EDGES, EDGES, 4), ConfigError, "one edge more"),
        (lambda: kernels.quantization_errors(EDGES, COUNTS, EDGES, COUNTS, 4), ConfigError, "one of both a grid"),
        (lambda: kernels.quantization_errors(EDGES, COUNTS, COUNTS, COUNTS, 0), ConfigError, "num_points=0 must be"),
        (
            lambda: kernels.observe_fake_quantize(X, INF, -INF, -8, 7, averaging=0.0),
            ConfigError,
            r"averaging=0.0 must be in \(0, 1\]",
        ),
        (
            lambda: kernels.observe_fake_quantize(X, INF, -INF, -1, 0, symmetric=True),
            ConfigError,
            "quant_min=-1, quant_max=0: a symmetric grid needs a step on both sides",
        ),
        (
            lambda: kernels.observe_fake_quantize(X, torch.ones(2), -INF, -8, 7, axis=0),
            ConfigError,
            "range_min has 2 values, expected 3",
        ),
        (
            lambda: kernels.fake_quantize_clipped(X, torch.tensor(0.1), torch.tensor(1.0), -8, 7),
            ConfigError,
            "clip_min=0.1",
        ),
        (
            lambda: kernels.fake_quantize_clipped(X, torch.tensor(-1.0), torch.tensor(-0.5), -8, 7),
            ConfigError,
            "clip_max=-0.5",
        ),
        (
            lambda: kernels.fake_quantize_clipped(X, torch.tensor(0.0), torch.tensor(0.0), -8, 7),
            ConfigError,
            "clip_max - clip_min=0.0",
        ),
        (
            lambda: kernels.fake_quantize_learned(X, torch.tensor(0.1), 0, -8, 7, grad_factor=-1.0),
            ConfigError,
            "grad_factor=-1.0",
        ),
        (lambda: kernels.fake_quantize_learned(X, torch.tensor(-0.1), 0, -8, 7), ConfigError, "scale=-0.1"),
        (lambda: kernels.nm_mask(X, 5, 4), ConfigError, "n=5, m=4: n kept of m needs 1 <= n <= m"),
        (lambda: kernels.nm_mask(X, 0, 4), ConfigError, "n=0, m=4"),
        (lambda: kernels.nm_mask(X, 2.0, 4), DtypeError, "n must be an int, got 2.0"),
        (lambda: kernels.nm_mask(X, 2, 4, axis=None), DtypeError, "axis must be an int, got None"),
        (lambda: kernels.nm_mask(X, 2, 2**70), ConfigError, "m=1180591620717411303424"),
        (lambda: kernels.observe_fake_quantize(X, INF, -INF, -8, 7, averaging="a"), DtypeError, "averaging must be"),
        (lambda: kernels.nm_mask(X[0, 0], 2, 4), ConfigError, "weight has no dimensions"),
        (lambda: kernels.nm_mask(X, 2, 4, axis=2), ConfigError, "axis=2 does not exist"),
        (lambda: kernels.nm_mask(X.bool(), 2, 4), DtypeError, "weight must be float32.*got torch.bool"),
        (lambda: kernels.block_mask(X.bool(), 0.5), DtypeError, "weight must be float32.*got torch.bool"),
        (lambda: kernels.block_mask(X[0], 0.5), ConfigError, r"weight has shape \(4,\): blocks need \(out, in"),
        (lambda: kernels.block_mask(X[None, None, None, None], 0.5), ConfigError, r"shape \(1, 1, 1, 1, 3, 4\)"),
        (lambda: kernels.block_mask(X, 1.0), ConfigError, r"ratio=1.0 must be in \[0, 1\)"),
        (lambda: kernels.block_mask(X, -0.1), ConfigError, r"ratio=-0.1 must be in \[0, 1\)"),
        (lambda: kernels.block_mask(X, float("nan")), ConfigError, r"ratio=nan must be in \[0, 1\)"),
        (lambda: kernels.block_mask(X, True), DtypeError, "ratio must be a number, got True"),
        (lambda: kernels.block_mask(X, "0.5"), DtypeError, "ratio must be a number, got '0.5'"),
        (lambda: kernels.block_mask(X, 0.5, cin=0), ConfigError, r"cin=0 must be in \[1, 2"),
        (lambda: kernels.block_mask(X, 0.5, cout=-64), ConfigError, "cout=-64 must be in"),
        (lambda: kernels.block_mask(X, 0.5, cout=2**70), ConfigError, "cout=1180591620717411303424 must be in"),
        (lambda: kernels.block_mask(X, 0.5, cin=True), DtypeError, "cin must be an int, got True"),
        (lambda: kernels.block_mask(X, 0.5, cout=64.0), DtypeError, "cout must be an int, got 64.0"),
        (lambda: kernels.block_mask(X, 0.5, per_position=1), DtypeError, "per_position must be True or False, got 1"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, FxslimError)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_that_is_not_looked_at_gives_nan(scale, device) -> None:
    """As on CUDA and under torch.compile, where looking would cost a wait."""
    x = torch.randn(50, device=device)
    scales = torch.tensor([scale], device=device)
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    y, mask = torch.ops.fxslim.fake_quantize(x, scales, zero_point, -8, 7, None, False, True)
    assert y.isnan().all()
    assert not mask.any()


def test_nan_and_infinity_in_the_data(device) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.3], device=device, requires_grad=True)
    y = kernels.fake_quantize(x, 0.1, 0, -8, 7)
    assert y.isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(y[1:].detach().cpu(), torch.tensor([0.7, -0.8, 0.3]))
    y.backward(torch.ones_like(y))
    assert x.grad.tolist() == [0, 0, 0, 1]
    low, high = kernels.observe_min_max(x.detach())
    assert low.isnan()
    assert high.isnan()
    assert [v.item() for v in kernels.observe_min_max(x.detach()[1:])] == [-torch.inf, torch.inf]
    nothing = INF.to(device)
    for data in (x.detach(), x.detach()[1:]):
        y, *_, scale, _ = kernels.observe_fake_quantize(data, nothing, -nothing, -8, 7)
        assert y.isnan().all()
        assert scale.isnan().all()


def test_empty_tensors(device) -> None:
    x = torch.empty(0, 4, device=device, requires_grad=True)
    y = kernels.fake_quantize(x, 0.1, 0, -8, 7, axis=1)
    y.sum().backward()
    assert x.grad.shape == (0, 4)
    low = torch.tensor([-1.0], device=device)
    y, new_low, _, scale, _ = kernels.observe_fake_quantize(x, low, -low, -8, 7, averaging=0.5)
    assert y.shape == (0, 4)
    assert new_low.item() == -1.0
    assert scale.item() == pytest.approx(2 / 15)
    nothing = INF.to(device)
    assert kernels.observe_fake_quantize(x, nothing, -nothing, -8, 7)[3].item() == 1.0
    assert kernels.nm_mask(x, 2, 4).shape == (0, 4)
    for shape in ((0, 4), (3, 0), (2, 3, 0), (2, 3, 4, 0), (2, 0, 3, 3, 3)):
        for per_position in (True, False):
            assert kernels.block_mask(torch.empty(shape, device=device), 0.5, 2, 2, per_position).shape == shape
    clips = [torch.tensor(v, device=device, requires_grad=True) for v in (-1.0, 1.0)]
    kernels.fake_quantize_clipped(x, *clips, -8, 7)[0].sum().backward()
    assert clips[0].grad == 0
    kernels.fake_quantize(torch.empty(3, 0), 0.1, 0, -8, 7, axis=1)


def test_scalars_in_zero_dimensions() -> None:
    x = torch.tensor(0.33, requires_grad=True)
    y = kernels.fake_quantize(x, 0.1, 0, -8, 7)
    y.backward()
    assert y.shape == ()
    assert x.grad == 1
    assert kernels.observe_min_max(x)[0].shape == ()


def test_a_constant_tensor_gets_a_grid() -> None:
    for value in (0.0, 5.0, -5.0, 1e-45):
        x = torch.full((7,), value)
        y, *_ = kernels.observe_fake_quantize(x, INF, -INF, -128, 127, averaging=1.0)
        assert torch.allclose(y, x, atol=1e-6)


@pytest.mark.parametrize(
    "low, high, scale", [(-0.5, 1.0, 1 / 127), (-1.0, 0.5, 1 / 128), (-1.0, 1.0, 1 / 127)], ids=str
)
def test_symmetric_scale_of_arq(low: float, high: float, scale: float) -> None:
    x = torch.tensor([low, 0.1, high])
    got = kernels.observe_fake_quantize(x, INF, -INF, -128, 127, averaging=1.0, symmetric=True)
    assert got[3].item() == pytest.approx(scale, rel=1e-6)
    assert got[4].item() == 0


def test_moving_average_of_the_range() -> None:
    x = torch.tensor([-2.0, 4.0])
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    _, new_low, new_high, *_ = kernels.observe_fake_quantize(x, low, high, 0, 255, averaging=0.25)
    assert (new_low.item(), new_high.item()) == (-1.25, 1.75)
    assert (low.item(), high.item()) == (-1.0, 1.0), "the old range is not changed in place"
    _, new_low, new_high, *_ = kernels.observe_fake_quantize(x / 4, low, high, 0, 255, averaging=None)
    assert (new_low.item(), new_high.item()) == (-1.0, 1.0)


@pytest.mark.slow
def test_more_than_two_billion_elements() -> None:
    x = torch.zeros(2**31 + 9, dtype=torch.float16)
    x[-3:] = torch.tensor([0.26, 9.0, -1.0], dtype=torch.float16)
    assert kernels.observe_min_max(x)[1] == 9.0
    y = kernels.fake_quantize(x, 0.5, 0, -4, 3)
    assert y[-3:].tolist() == [0.5, 1.5, -1.0]
    del y
    assert kernels.nm_mask(x, 2, 4, axis=0)[-1]
