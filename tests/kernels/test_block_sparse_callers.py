# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolutions inside torch.compile, torch.export, autograd and autocast; and what they refuse."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxslim import ConfigError, DtypeError, kernels
from fxslim.kernels.block_layout import pack_blocks
from tests.kernels.block_sparse_cases import GRIDS, Case, int8_arguments
from tests.kernels.test_block_sparse import float_result, int8_result, native_only
from tests.kernels.test_compilation import every_backend

CASE = Case(num_out=40, cin=8, cout=32, kernel_size=(3, 2), padding=(1, 0, 1, 1), stride=(2, 1), ratio=0.5, relu=True)


class Convolving(torch.nn.Module):
    """Packed outside: how many blocks there are is known."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.packed = [t.to(device) for t in pack_blocks(CASE.weight(24).to(dtype), CASE.cin, CASE.cout)]
        self.of_bytes = int8_arguments(CASE, torch.zeros(1, 1, 1, 24), GRIDS[0])[1:-1]
        self.of_bytes = [t.to(device) if isinstance(t, Tensor) else t for t in self.of_bytes]
        self.bias = CASE.bias().to(device)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype)
        output = kernels.block_sparse_conv2d(x, *self.packed, bias, num_in=24, **CASE.settings)
        bytes_in = x.float() * 2
        settings = {**CASE.settings, "num_in": 24, "cin": CASE.cin}
        return output * 2 + kernels.block_sparse_conv2d_int8(bytes_in, *self.of_bytes, self.bias, **settings)


# On the CPU only the first has a kernel.
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@every_backend
@every_dtype
def test_compiled_equals_eager(backend: str, dtype: torch.dtype, device) -> None:
    torch._dynamo.reset()
    model = Convolving(dtype, device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3):
        x = torch.randn(batch, 7, 6, 24, device=device).to(dtype)
        torch.testing.assert_close(compiled(x), model(x))


@every_dtype
def test_exported_with_any_batch_and_height(dtype: torch.dtype) -> None:
    model = Convolving(dtype, torch.device("cpu"))
    sides = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("height", min=4, max=64)}
    program = torch.export.export(model, (torch.randn(2, 8, 6, 24).to(dtype),), dynamic_shapes=(sides,))
    # What runs without gradients is a graph of its own.
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    used = {str(node.target) for graph in graphs for node in graph.nodes if "fxslim" in str(node.target)}
    floats = set() if dtype == torch.float64 else {"fxslim.block_sparse_conv2d.default"}
    assert used == {"fxslim.block_sparse_conv2d_int8.default", *floats}
    x = torch.randn(3, 11, 6, 24).to(dtype)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


@every_dtype
def test_no_gradient(dtype: torch.dtype, device) -> None:
    x = torch.randn(2, 7, 6, 24, device=device).to(dtype).requires_grad_()
    output = float_result(CASE, x)
    assert not output.requires_grad
    assert torch.equal(output, float_result(CASE, x.detach()))
    x = torch.randn(2, 7, 6, 24, requires_grad=True)
    assert not int8_result(CASE, x, int8_arguments(CASE, x, GRIDS[0])).requires_grad


@every_dtype
def test_autocast_changes_nothing(dtype: torch.dtype, device) -> None:
    x = torch.randn(2, 7, 6, 24, device=device).to(dtype)
    want = float_result(CASE, x)
    of_bytes = x.float().cpu()
    arguments = int8_arguments(CASE, of_bytes, GRIDS[0])
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(float_result(CASE, x), want)
        assert float_result(CASE, x).dtype == dtype
        got = int8_result(CASE, of_bytes, arguments)
    assert torch.equal(got, int8_result(CASE, of_bytes, arguments))


X = torch.randn(1, 4, 5, 24)
PACKED = pack_blocks(CASE.weight(24).float(), CASE.cin, CASE.cout)
BYTES = int8_arguments(CASE, X, GRIDS[0])


def convolve(x: Any = X, packed: tuple = PACKED, bias: Tensor | None = None, **changed: Any) -> Tensor:
    return kernels.block_sparse_conv2d(x, *packed, bias, **{**CASE.settings, "num_in": 24, **changed})


def convolve_bytes(at: int | None = None, value: Any = None, **changed: Any) -> Tensor:
    arguments = [value if i == at else argument for i, argument in enumerate(BYTES)]
    return kernels.block_sparse_conv2d_int8(*arguments, **{**CASE.settings, "num_in": 24, "cin": CASE.cin, **changed})


blocks, places, starts = PACKED


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: convolve([1.0]), DtypeError, "input must be a Tensor, got list"),
        (lambda: convolve(X.int()), DtypeError, "input must be float32.*got torch.int32"),
        (lambda: convolve(X.to_sparse()), DtypeError, "input must be a dense tensor"),
        (lambda: convolve(X.double()), DtypeError, "blocks must be torch.float64 as the input is, got torch.float32"),
        (lambda: convolve(bias=torch.zeros(40).half()), DtypeError, "bias must be torch.float32 as the input is"),
        (lambda: convolve(X[0]), ConfigError, r"input has shape \(4, 5, 24\): it must be \(batch, height"),
        (lambda: convolve(X[..., 1:]), ConfigError, r"\(1, 4, 5, 23\): .* of num_in=24 channels"),
        (lambda: convolve(X[..., :0], num_in=0), ConfigError, "of num_in=0 channels, at least 1"),
        (lambda: convolve(kernel_size=(3, 0)), ConfigError, r"kernel_size=\[3, 0\] must be 2 integers >= 1"),
        (lambda: convolve(kernel_size=(3,)), ConfigError, r"kernel_size=\[3\] must be 2"),
        (lambda: convolve(stride=(0, 1)), ConfigError, r"stride=\[0, 1\] must be 2 integers >= 1"),
        (lambda: convolve(dilation=(1, -1)), ConfigError, r"dilation=\[1, -1\] must be 2 integers >= 1"),
        (lambda: convolve(padding=(1, 1)), ConfigError, r"padding=\[1, 1\] must be 4 integers >= 0"),
        (lambda: convolve(padding=(1, -1, 0, 0)), ConfigError, r"padding=\[1, -1, 0, 0\] must be 4 integers"),
        (lambda: convolve(dilation=(9, 1)), ConfigError, r"input of 4x5, padded by \[1, 0, 1, 1\], is smaller than"),
        (lambda: convolve(num_out=0), ConfigError, "num_out=0 and cout=32 must be at least 1"),
        (lambda: convolve(cout=0), ConfigError, "num_out=40 and cout=0 must be at least 1"),
        (lambda: convolve(cout=64), ConfigError, r"64 of 40 filters are 3 panels of 16"),
        (
            lambda: convolve(packed=(blocks[..., :8], places, starts)),
            ConfigError,
            r"blocks have shape \(\d+, 2, 8, 8\)",
        ),
        (lambda: convolve(packed=(blocks[..., None], places, starts)), ConfigError, "blocks have 4 dimensions"),
        (lambda: convolve(packed=(blocks, places[1:], starts)), ConfigError, r"places \(\d+, 2\) and starts"),
        (lambda: convolve(packed=(blocks, places, starts[1:])), ConfigError, r"starts \(2,\) must be .* \(3,\)"),
        (lambda: convolve(packed=(blocks, places.long(), starts)), DtypeError, "must be int32, got torch.int64 and"),
        (lambda: convolve(packed=(blocks, places, starts.long())), DtypeError, "torch.int32 and torch.int64"),
        (lambda: convolve(bias=torch.zeros(39)), ConfigError, r"bias has shape \(39,\), not \(40,\)"),
        (lambda: convolve_bytes(0, X.double()), DtypeError, "input must be float32, got torch.float64"),
        (lambda: convolve_bytes(1, torch.ones(1).half()), DtypeError, "scale must be float32, got torch.float16"),
        (lambda: convolve_bytes(1, torch.ones(2)), ConfigError, r"scale \(2,\) must be one number"),
        (lambda: convolve_bytes(2, 256), ConfigError, "grid 0 to 255 with zero point 256: at most 256 steps around it"),
        (lambda: convolve_bytes(4, 256), ConfigError, "grid 0 to 256 with zero point 128"),
        (lambda: convolve_bytes(4, 0), ConfigError, "grid 0 to 0 with zero point 128"),
        (lambda: convolve_bytes(5, blocks), DtypeError, "blocks must be int8, got torch.float32"),
        (lambda: convolve_bytes(5, BYTES[5][:, :, :, :, 0]), ConfigError, "blocks have 5 dimensions"),
        (lambda: convolve_bytes(8, torch.ones(39)), ConfigError, r"factor \(39,\) \(40,\)"),
        (lambda: convolve_bytes(8, torch.ones(40).double()), DtypeError, "factor must be float32, got torch.float64"),
        (lambda: convolve_bytes(9, torch.ones(40).double()), DtypeError, "bias must be float32, got torch.float64"),
        (lambda: convolve_bytes(9, torch.ones(41)), ConfigError, r"bias has shape \(41,\)"),
        (lambda: convolve_bytes(cin=9), ConfigError, "cin=9 of 24 channels are 3 quads"),
        (lambda: convolve_bytes(cin=0), ConfigError, "cin=0 of 24 channels"),
        (lambda: convolve_bytes(0, X[..., 1:]), ConfigError, "of num_in=24 channels"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_sums_that_32_bits_may_not_hold_are_refused() -> None:
    """Right up to the last input that fits, where every product is as large as can be."""
    for num_in, fits in ((2**31 // (128 * 255), True), (2**31 // (128 * 255) + 1, False)):
        x, weight = torch.full((1, 1, 1, num_in), 255.0), torch.full((1, num_in), -128, dtype=torch.int8)
        packed = pack_blocks(weight)
        arguments = (x, torch.ones(1), 0, 0, 255, *packed, torch.ones(1))
        if fits:
            got = kernels.block_sparse_conv2d_int8(*arguments, num_out=1, num_in=num_in)
            assert got.item() == torch.tensor(-128.0 * 255 * num_in, dtype=torch.float64).float().item()
        else:
            with pytest.raises(ConfigError, match=f"sums of {num_in} channels may reach 21475"):
                kernels.block_sparse_conv2d_int8(*arguments, num_out=1, num_in=num_in)


@native_only
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize(
    "name, at, value",
    [
        *(("places", (at, 0), value) for at in (0, -1) for value in (-1, 3, 2**31 - 1, -(2**31))),
        *(("places", (at, 1), value) for at in (0, -1) for value in (-1, 6, 2**31 - 1)),
        *(("starts", 0, value) for value in (-1, 1)),
        *(("starts", 1, value) for value in (-1, len(places) + 1, 2**31 - 1)),
        *(("starts", 2, value) for value in (0, len(places) - 1, len(places) + 1, 2**31 - 1)),
    ],
)
def test_damaged_places_and_starts_are_not_read(of_bytes: bool, name: str, at: Any, value: int) -> None:
    given = {"places": BYTES[6] if of_bytes else places, "starts": BYTES[7] if of_bytes else starts}
    given[name] = given[name].clone()
    given[name][at] = value
    damaged = tuple(given.values())
    call = partial(convolve, packed=(blocks, *damaged))
    if of_bytes:
        call = partial(int8_result, CASE, X, (*BYTES[:6], *damaged, *BYTES[8:]))
    with pytest.raises(RuntimeError, match="places or starts name blocks that the weight does not have"):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_damaged_places_make_nan_on_cuda() -> None:
    """Looking at them beforehand would cost a wait."""
    x, given = X.cuda().bfloat16(), [blocks.cuda().bfloat16(), places.cuda(), starts.cuda()]
    given[1][0, 0] = 3
    got = kernels.block_sparse_conv2d(x, *given, num_in=24, **CASE.settings)
    assert got[..., :32].isnan().all()
    assert got[..., 32:].isfinite().all()
