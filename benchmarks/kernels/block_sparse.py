# SPDX-License-Identifier: Apache-2.0
"""The kernels that skip zero blocks, layer by layer, beside torch's dense convolution and ONNX Runtime's of bytes.

    python -m benchmarks.kernels.block_sparse [--batches 1 8] [--only resnet50] [--rounds 15] [--report FOLDER]

One thread, channels last, process-CPU time; contestants take turns in one process, figures are medians.
"""

import argparse
import datetime
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.peak_rate import peak_gflops
from benchmarks.kernels.sparse_layers import MODELS, Layer, layers_of
from benchmarks.timing import machine, take_turns
from fxslim import kernels

RATIOS = (0.0, 0.5, 0.75)
INT8_RATIOS = (0.5, 0.75)
WEIGHT_BITS = (8, 7)
# The kernel rounds a sum of this many float32 products.
TOLERANCE = 1e-5


def check(got: Tensor, wanted: Tensor, what: str) -> None:
    """A kernel that computes something else is not measured."""
    off = float((got - wanted).norm() / wanted.norm())
    if not off <= TOLERANCE:
        raise SystemExit(f"{what}: off by {off:.1e} of the dense result")


def settings(layer: Layer) -> dict[str, Any]:
    """What both operators are told."""
    side = layer.padding
    return {
        "num_out": layer.num_out, "num_in": layer.num_in, "kernel_size": (layer.kernel,) * 2,
        "stride": (layer.stride,) * 2, "padding": (side,) * 4,
    }  # fmt: skip


def float_seconds(layer: Layer, batch: int, ratio: float, rounds: int) -> tuple[float, float]:
    """Of the dense and of the sparse layer."""
    weight, bias, x = layer.weight(ratio), torch.randn(layer.num_out), layer.input(batch)
    packed, told, rows = kernels.pack_blocks(weight), settings(layer), x.permute(0, 2, 3, 1)
    lying = weight.contiguous(memory_format=torch.channels_last)

    def dense() -> Tensor:
        return F.conv2d(x, lying, bias, layer.stride, layer.padding)

    def sparse() -> Tensor:
        return kernels.block_sparse_conv2d(rows, *packed, bias, **told)

    check(sparse().permute(0, 3, 1, 2), dense(), f"{layer}, {ratio:.0%}")
    seconds = take_turns({"dense": dense, "sparse": sparse}, torch.device("cpu"), rounds)
    return statistics.median(seconds["dense"]), statistics.median(seconds["sparse"])


def runtime_layer(layer: Layer, batch: int, weight: np.ndarray, *, bare: bool) -> Callable[[np.ndarray], object]:
    """ONNX Runtime's convolution of bytes, channels last; with its quantizers of float edges unless ``bare``."""
    side = (layer.size - 1) // layer.stride + 1
    kind = TensorProto.UINT8 if bare else TensorProto.FLOAT
    inner = ["x", "y"] if bare else ["q", "r"]
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(128), "w": weight,
        "ws": np.full(layer.num_out, 0.01, np.float32), "wz": np.zeros(layer.num_out, np.int8),
        "ys": np.float32(0.5), "yz": np.uint8(128),
    }  # fmt: skip
    conv = helper.make_node(
        "QLinearConv", [inner[0], "xs", "xz", "w", "ws", "wz", "ys", "yz"], [inner[1]], domain="com.microsoft",
        channels_last=1, kernel_shape=[layer.kernel] * 2, strides=[layer.stride] * 2, pads=[layer.padding] * 4,
    )  # fmt: skip
    nodes = [conv]
    if not bare:
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["r", "ys", "yz"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, [batch, layer.size, layer.size, layer.num_in])],
        [helper.make_tensor_value_info("y", kind, [batch, side, side, layer.num_out])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def int8_seconds(layer: Layer, batch: int, ratio: float, bits: int, rounds: int) -> tuple[float, float, float]:
    """Of ONNX Runtime's kernel alone, of it with float edges, and of ours, whose edges are float."""
    dense, most = layer.weight(ratio), 2 ** (bits - 1) - 1
    weight = (dense * (most / dense.abs().max())).round().to(torch.int8)
    packed, told = kernels.pack_blocks(weight), settings(layer)
    rows = layer.input(batch).permute(0, 2, 3, 1)
    scale, factor, bias = torch.tensor(0.02), torch.full((layer.num_out,), 0.0002), torch.zeros(layer.num_out)
    bare = runtime_layer(layer, batch, weight.numpy(), bare=True)
    whole = runtime_layer(layer, batch, weight.numpy(), bare=False)
    x, bytes_of_x = rows.numpy(), (rows / 0.02 + 128).round().clamp(0, 255).to(torch.uint8).numpy()

    def sparse() -> Tensor:
        return kernels.block_sparse_conv2d_int8(rows, scale, 128, 0, 255, *packed, factor, bias, **told)

    contestants = {"bare": lambda: bare(bytes_of_x), "whole": lambda: whole(x), "sparse": sparse}
    seconds = take_turns(contestants, torch.device("cpu"), rounds)
    first, second, third = (statistics.median(seconds[name]) for name in contestants)
    return first, second, third


def float_table(layers: Counter[Layer], batch: int, rounds: int, peak: float) -> list[str]:
    """A line for each layer, and their sum."""
    heads = [f"{ratio:.0%}: dense ms | ours ms | times" for ratio in RATIOS]
    lines = [f"| layer | how often | {' | '.join(heads)} | dense of peak | ours of peak |", "|---" * 13 + "|"]
    totals = {ratio: [0.0, 0.0] for ratio in RATIOS}
    for layer, count in sorted(layers.items()):
        cells = [str(layer), str(count)]
        rates: list[float] = []
        for ratio in RATIOS:
            dense, sparse = float_seconds(layer, batch, ratio, rounds)
            totals[ratio][0] += count * dense
            totals[ratio][1] += count * sparse
            cells += [f"{dense * 1e3:.2f}", f"{sparse * 1e3:.2f}", f"{dense / sparse:.2f}"]
            rates = rates or [layer.macs(batch) * 2 / seconds / 1e9 / peak for seconds in (dense, sparse)]
        lines.append("| " + " | ".join([*cells, *(f"{rate:.0%}" for rate in rates)]) + " |")
        print(lines[-1], flush=True)
    cells = ["**all**", str(sum(layers.values()))]
    for dense, sparse in totals.values():
        cells += [f"{dense * 1e3:.0f}", f"{sparse * 1e3:.0f}", f"**{dense / sparse:.2f}**"]
    work = sum(count * layer.macs(batch) for layer, count in layers.items()) * 2 / 1e9 / peak
    cells += [f"{work / seconds:.0%}" for seconds in totals[0.0]]
    lines.append("| " + " | ".join(cells) + " |")
    print(lines[-1], flush=True)
    return lines


def int8_table(layers: Counter[Layer], batch: int, bits: int, rounds: int) -> list[str]:
    """The same for bytes."""
    heads = [f"{ratio:.0%}: kernel ms | with edges ms | ours ms | over kernel | over edges" for ratio in INT8_RATIOS]
    lines = [f"| layer | how often | {' | '.join(heads)} |", "|---" * 12 + "|"]
    totals = {ratio: [0.0, 0.0, 0.0] for ratio in INT8_RATIOS}
    for layer, count in sorted(layers.items()):
        cells = [str(layer), str(count)]
        for ratio in INT8_RATIOS:
            found = int8_seconds(layer, batch, ratio, bits, rounds)
            totals[ratio] = [total + count * one for total, one in zip(totals[ratio], found, strict=True)]
            cells += [f"{one * 1e3:.2f}" for one in found] + [f"{one / found[2]:.2f}" for one in found[:2]]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    cells = ["**all**", str(sum(layers.values()))]
    for sums in totals.values():
        cells += [f"{one * 1e3:.0f}" for one in sums] + [f"**{one / sums[2]:.2f}**" for one in sums[:2]]
    lines.append("| " + " | ".join(cells) + " |")
    print(lines[-1], flush=True)
    return lines


def report(models: list[str], batches: list[int], rounds: int) -> str:
    """The whole report; lines are printed as they come."""
    peak = peak_gflops()
    lines: list[str] = []
    for name in models:
        layers = layers_of(name)
        for batch in batches:
            lines += [f"## {name}, batch {batch}, float32", "", *float_table(layers, batch, rounds, peak), ""]
        for bits in WEIGHT_BITS:
            lines += [f"## {name}, batch 1, weights of {bits} bits", "", *int8_table(layers, 1, bits, rounds), ""]
    return "\n".join([
        f"# Convolutions that skip zero blocks, {datetime.date.today()}", "",
        f"{machine()}, onnxruntime {onnxruntime.__version__}", "",
        "`python -m benchmarks.kernels.block_sparse`: one thread, process-CPU time, channels last, Cin32Cout64 masks",
        f"by magnitude on random weights; contestants take turns, medians of {rounds} rounds after two to warm up.",
        "Layers with 64 input channels or more, at 224 pixels; sums count each as often as the model has it.",
        f"Peak: {peak:.0f} GFLOP/s, multiply-adds in registers in the same process; `of peak` is at 0 %.", "",
        "float32: `dense` is torch's convolution (oneDNN) with the same masked weight. Bytes: `kernel` is ONNX",
        "Runtime's QLinearConv from bytes to bytes, dense; `with edges` quantizes a float input and gives float, as",
        "ours does. Ours is exact with any weights; where a processor has no VNNI, ONNX Runtime's sums of two products",
        "saturate in 16 bits, except with weights of 7 bits, with which ours takes the same instructions.", "",
        *lines,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(options.only, options.batches, options.rounds)
    path = options.report / f"{datetime.date.today()}-block-sparse.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
