# SPDX-License-Identifier: Apache-2.0
"""Which integer kernels torch brings, whether their sums are exact, and what deployed layers cost beside float.

    python -m benchmarks.models.deploy_layers [--rounds 7] [--report FOLDER]

Shapes of ResNet-18 at 224x224 and of BERT-base at 128 tokens, batch 1 and 16, and ResNet-18 whole. Contestants take
turns in one process, one thread, process-CPU time; a figure is the median of float time / its time in the same round.
"""

import argparse
import copy
import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import fxslim
from benchmarks.timing import machine, median_ratio, take_turns
from fxslim.nn.byte_products import sums_of_this_cpu

BATCHES = (1, 16)
TOKENS = 128
# name: (channels in, size, channels out, kernel, stride)
CONVS = {
    "conv1 7x7/2": (3, 224, 64, 7, 2),
    "layer1 3x3": (64, 56, 64, 3, 1),
    "layer2 3x3/2": (64, 56, 128, 3, 2),
    "layer2 3x3": (128, 28, 128, 3, 1),
    "layer2 1x1/2": (64, 56, 128, 1, 2),
    "layer3 3x3": (256, 14, 256, 3, 1),
    "layer4 3x3": (512, 7, 512, 3, 1),
}
# name: (inputs, outputs, rows for each of the batch)
LINEARS = {
    "ResNet-18 fc": (512, 1000, 1),
    "BERT query, one token": (768, 768, 1),
    "BERT query": (768, 768, TOKENS),
    "BERT up": (768, 3072, TOKENS),
    "BERT down": (3072, 768, TOKENS),
}
Calls = dict[str, Callable[[], object]]


def deployed(layer: nn.Module, config: str, x: Tensor) -> nn.Module:
    """The layer as ``convert`` leaves it."""
    return fxslim.convert(fxslim.quantize(copy.deepcopy(layer), config, data=[x], calibration="min_max")).eval()


def layer_calls(layer: nn.Module, x: Tensor) -> Calls:
    """float, and deployed with weights of 7 and 8 bits."""
    return {
        "float": functools.partial(layer, x),
        "w7a8": functools.partial(deployed(layer, "w7a8", x), x),
        "int8": functools.partial(deployed(layer, "int8", x), x),
    }


def conv_rows(batch: int, rounds: int) -> list[str]:
    """Ratios for convolutions; float in the faster of both memory formats."""
    lines = []
    for name, (inputs, size, outputs, kernel, stride) in CONVS.items():
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        x = torch.randn(batch, inputs, size, size)
        last = x.contiguous(memory_format=torch.channels_last)
        calls = layer_calls(layer, last)
        calls["float, contiguous"] = functools.partial(layer, x)
        seconds = take_turns(calls, torch.device("cpu"), rounds)
        float_name = min(("float", "float, contiguous"), key=lambda one: sum(seconds[one]))
        shown = [f"{median_ratio(seconds[float_name], seconds[one]):.2f}" for one in ("w7a8", "int8")]
        lines.append(f"| {name} | {batch} | {' | '.join(shown)} |")
    return lines


def linear_rows(batch: int, rounds: int) -> list[str]:
    """Ratios for linear layers, and for torch's other kernels, by themselves."""
    lines = []
    for name, (inputs, outputs, each) in LINEARS.items():
        layer, x = nn.Linear(inputs, outputs), torch.randn(batch * each, inputs)
        calls = layer_calls(layer, x) | {one: functools.partial(deployed(layer, one, x), x) for one in ("w8", "w4")}
        others = kernel_calls(layer, x)
        # Some take seconds for more.
        calls |= others if len(x) <= TOKENS else {}
        seconds = take_turns(calls, torch.device("cpu"), rounds)
        shown = [f"{median_ratio(seconds['float'], seconds[one]):.3g}" for one in list(calls)[1:]]
        shown += [""] * (4 + len(others) + 1 - len(calls))
        lines.append(f"| {name} | {batch * each} | {' | '.join(shown)} |")
    return lines


def kernel_calls(layer: nn.Linear, x: Tensor) -> Calls:
    """Kernels that deployed layers do not use."""
    weight = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8)
    given = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    scale, group = torch.ones(weight.shape[0]), 32
    # It takes outputs by 16.
    integers = torch.randint(0, 16, (weight.shape[0] // 16 * 16, weight.shape[1]), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    grids = torch.ones(weight.shape[1] // group, len(integers), 2, dtype=torch.bfloat16)
    half = x.bfloat16()
    return {
        "_int_mm": lambda: torch._int_mm(given, weight.t()),
        "_weight_int8pack_mm": lambda: torch._weight_int8pack_mm(x, weight, scale),
        "_weight_int4pack_mm, bfloat16": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, group, grids),
    }


def exactness_rows() -> list[str]:
    """The largest error of sums at extremes, in shares of the sum."""
    lines = []
    for x_value, weight_value in ((255, -128), (255, 127), (255, 64), (255, -64), (127, -128)):
        x = torch.full((4, 768), x_value, dtype=torch.uint8)
        weight = torch.full((64, 768), weight_value, dtype=torch.int8)
        exact = 768 * x_value * weight_value
        found = _product(x, weight)
        picture = torch.full((1, 64, 8, 8), x_value, dtype=torch.uint8)
        filters = torch.full((64, 64, 3, 3), weight_value, dtype=torch.int8)
        shares = [
            float((found.double() - exact).abs().max()) / abs(exact),
            float(
                (_convolution(picture, filters)[:, :, 1:-1, 1:-1].double() / (576 * x_value * weight_value) - 1)
                .abs()
                .max()
            ),
        ]
        lines.append(f"| {x_value} x {weight_value} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return lines


def _product(x: Tensor, weight: Tensor) -> Tensor:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones, zeros = _grids(weight)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    ones, zeros = _grids(weight)
    where: Any = [1, 1], [1, 1], [1, 1], 1
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *where, list(x.shape))
    return torch.ops.onednn.qconv2d_pointwise(
        x, 1.0, 0, packed, ones, zeros, None, *where, 1.0, 0, torch.float32, "none", [], ""
    )


def _grids(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)


def model_rows(batch: int, size: int, rounds: int) -> list[str]:
    """ResNet-18: simulated and converted, time and bytes."""
    model, x = models.resnet18().eval(), torch.randn(batch, 3, size, size)
    calls: Calls = {"float": functools.partial(model, x)}
    wanted = {"w7a8": "w7a8", "int8": "int8"}
    lines, sizes = [], {"float": _bytes(model)}
    for name, config in wanted.items():
        made = fxslim.quantize(copy.deepcopy(model), config, data=[x], target="tensorrt", fold_batch_norms=True)
        calls[f"{name}, simulated"] = functools.partial(made, x)
        converted = fxslim.convert(copy.deepcopy(made), example_inputs=x)
        calls[f"{name}, converted"] = functools.partial(converted, x)
        sizes[f"{name}, converted"] = _bytes(converted)
    seconds = take_turns(calls, torch.device("cpu"), rounds)
    for name in list(calls)[1:]:
        kept = f"{sizes[name] / sizes['float']:.1%}" if name in sizes else ""
        lines.append(
            f"| {name} | {batch}x3x{size}x{size} | {median_ratio(seconds['float'], seconds[name]):.2f} | {kept} |"
        )
    return lines


def _bytes(model: nn.Module) -> int:
    return sum(state.numel() * state.element_size() for state in model.state_dict().values())


@torch.no_grad()
def report(rounds: int) -> str:
    """All tables."""
    convs = [row for batch in BATCHES for row in conv_rows(batch, rounds)]
    linears = [row for batch in BATCHES for row in linear_rows(batch, rounds)]
    whole = [row for batch, size in ((1, 224), (16, 64)) for row in model_rows(batch, size, rounds)]
    parts = [
        "# What deployed layers cost", "",
        f"{datetime.date.today()}; {machine()}", "",
        "`python -m benchmarks.models.deploy_layers`: one thread, process-CPU time, median of float time / time in the",
        "same round: above 1 is faster than float. Layers as `fxslim.convert` leaves them, from float inputs to float",
        f"outputs. Sums of two products on this CPU: {sums_of_this_cpu()}. w7a8: weights of 7 bits; int8: of 8, where",
        "sums are narrow in two halves.", "",
        "Errors of the kernels' own sums, where all products are the same:", "",
        "| input x weight | qlinear_pointwise | qconv2d_pointwise |", "|---|---|---|", *exactness_rows(), "",
        "| convolution of ResNet-18 | batch | w7a8 | int8 |", "|---|---|---|---|", *convs, "",
        "w8 and w4 are weights alone; the last three are torch's kernels by themselves, which `convert` leaves.", "",
        "| linear | rows | w7a8 | int8 | w8 | w4 | _int_mm | _weight_int8pack_mm | _weight_int4pack_mm, bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|", *linears, "",
        "ResNet-18, target tensorrt, norms folded:", "",
        "| ResNet-18 | input | float time / time | bytes of the state |", "|---|---|---|---|", *whole,
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(arguments.rounds)
    print(text)
    if arguments.report:
        path = arguments.report / f"{datetime.date.today()}-deploy-layers.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
