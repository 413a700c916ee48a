# SPDX-License-Identifier: Apache-2.0
"""Where skipping blocks starts to pay: deployed layers with few zero blocks, and small ones, beside the dense layers.

    python -m benchmarks.kernels.sparse_rule [--rounds 21]

What `fxslim/deploy/sparse_speed.py` says is set by this. One thread, process-CPU time, medians of ratios.
"""

import argparse
import copy

import torch
from torch import nn

import fxslim
from benchmarks.kernels.sparse_layers import Layer
from benchmarks.timing import median_ratio, take_turns

RATIOS = (0.1, 0.15, 0.25, 0.5)
# The first are below the least numbers of channels, the others ordinary.
LAYERS = (
    Layer(num_in=16, num_out=64, size=56, kernel=3, stride=1),
    Layer(num_in=32, num_out=8, size=56, kernel=3, stride=1),
    Layer(num_in=32, num_out=16, size=56, kernel=3, stride=1),
    Layer(num_in=32, num_out=64, size=56, kernel=3, stride=1),
    Layer(num_in=64, num_out=64, size=56, kernel=3, stride=1),
    Layer(num_in=256, num_out=64, size=56, kernel=1, stride=1),
    Layer(num_in=128, num_out=128, size=28, kernel=3, stride=1),
    Layer(num_in=256, num_out=256, size=14, kernel=3, stride=1),
    Layer(num_in=512, num_out=512, size=7, kernel=3, stride=1),
)
FORMATS = ("float", "w7a8", "int8")


def times(layer: Layer, ratio: float, form: str, rounds: int) -> str:
    """The dense deployed layer over the sparse one; empty where the mask has no zero block."""
    conv = nn.Conv2d(layer.num_in, layer.num_out, layer.kernel, layer.stride, layer.padding)
    conv.weight.data = layer.weight(ratio)
    x = layer.input(1)
    model = nn.Sequential(conv).eval()
    if form != "float":
        fxslim.quantize(model, form, data=[x], calibration="min_max", example_inputs=x)
    try:
        sparse = fxslim.convert(copy.deepcopy(model), example_inputs=x, sparse=True)
    except fxslim.FxslimError:
        return ""
    if "Sparse" not in type(next(sparse.children())).__name__:
        return ""
    dense = (
        model.to(memory_format=torch.channels_last)
        if form == "float"
        else fxslim.convert(model, example_inputs=x, sparse=False)
    )
    with torch.no_grad():
        seconds = take_turns({"dense": lambda: dense(x), "sparse": lambda: sparse(x)}, torch.device("cpu"), rounds)
    return f"{median_ratio(seconds['dense'], seconds['sparse']):.2f}"


def rule_table(rounds: int) -> list[str]:
    """A line for each layer."""
    heads = [f"{form} {ratio:.0%}" for form in FORMATS for ratio in RATIOS]
    lines = ["| layer | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for layer in LAYERS:
        cells = [times(layer, ratio, form, rounds) for form in FORMATS for ratio in RATIOS]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("\n".join(rule_table(options.rounds)[:2]))


if __name__ == "__main__":
    main()
