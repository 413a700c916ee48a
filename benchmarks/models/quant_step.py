# SPDX-License-Identifier: Apache-2.0
"""What quantization-aware training costs: a training step, and calibration, beside float and torch.ao.

    python -m benchmarks.models.quant_step [--rounds 12] [--report FOLDER]

ResNet-18 and MobileNetV2, batch 16 of 3x64x64, forward, backward and SGD. Contestants take turns in one process, one
thread, process-CPU time; a figure is the median of ratios to float in the same round. Memory is what the resident
memory of a process of its own grows by at most over 6 steps.
"""

import argparse
import copy
import datetime
import functools
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

import fxslim
from benchmarks.models.peak_memory import resident
from benchmarks.timing import machine, take_turns
from fxslim.nn import ActivationQuant, QuantConfig

NETS = ("resnet18", "mobilenet_v2")
X, LABELS = torch.randn(16, 3, 64, 64), torch.randint(0, 1000, (16,))
OBSERVED = ActivationQuant(method="min_max")
KINDS: dict[str, dict[str, Any]] = {
    "min_max, inputs of layers": {"config": QuantConfig(activation=OBSERVED)},
    "min_max, for tensorrt": {"config": QuantConfig(activation=OBSERVED), "target": "tensorrt", "placed": True},
    "min_max, for onnxruntime": {"config": QuantConfig(activation=OBSERVED), "placed": True},
    "ulq, inputs of layers": {"config": QuantConfig()},
    "ulq, for onnxruntime": {"config": QuantConfig(), "placed": True},
    "weights alone": {"config": QuantConfig(activation=None)},
}
IN_MEMORY = ("min_max, for onnxruntime",)
SAVING = ", save_memory"


def ours(net: str, kind: str) -> nn.Module:
    """A prepared model."""
    wishes = dict(KINDS[kind.removesuffix(SAVING)])
    config = wishes.pop("config")
    if kind.endswith(SAVING):
        config = QuantConfig(weight=config.weight, activation=config.activation, save_memory=True)
    if wishes.pop("placed", False):
        wishes["example_inputs"] = X[:1]
    return fxslim.prepare_qat(getattr(models, net)(), config, **wishes)


def torch_ao(net: str) -> nn.Module:
    """torch.ao's FX mode: convolutions fused with their norms, observers and fake quantization in one operator."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(models, net)().train()
        return prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (X[:1],))


def made(net: str, kind: str) -> nn.Module:
    """A model in training mode."""
    if kind == "float":
        return getattr(models, net)().train()
    return (torch_ao(net) if kind == "torch.ao" else ours(net, kind)).train()


def stepper(model: nn.Module) -> Callable[[], None]:
    """One training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()

    return step


def step_rows(rounds: int) -> list[str]:
    """Ratios of a step to a float one, with the quartiles."""
    lines = []
    for net in NETS:
        kinds = ["float", *KINDS, "torch.ao"]
        seconds = take_turns({kind: stepper(made(net, kind)) for kind in kinds}, torch.device("cpu"), rounds)
        for kind in kinds[1:]:
            ratios = [a / b for a, b in zip(seconds[kind], seconds["float"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            lines.append(f"| {net} | {kind} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return lines


def calibration_rows(rounds: int) -> list[str]:
    """Forwards of 8 batches while ranges are chosen, against the same forwards in float."""
    batches = [torch.randn(16, 3, 64, 64) for _ in range(8)]
    float_model = models.resnet18().eval()
    contestants: dict[str, Callable[[], object]] = {}

    def forwards(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def calibrated(model: nn.Module) -> None:
        with fxslim.calibrating(model):
            forwards(model)

    contestants["float"] = functools.partial(forwards, float_model)
    for method in ("min_max", "percentile", "mse", "ifmr"):
        static = ActivationQuant(method="static", calibration=method)
        model = fxslim.prepare_qat(copy.deepcopy(float_model), QuantConfig(activation=static), example_inputs=X[:1])
        contestants[method] = functools.partial(calibrated, model.eval())
    contestants["torch.ao, histogram"] = functools.partial(forwards, observed_by_torch(float_model))
    seconds = take_turns(contestants, torch.device("cpu"), rounds)
    lines = []
    for name in list(contestants)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["float"], strict=True)]
        lines.append(f"| {name} | {statistics.median(ratios):.2f} |")
    return lines


def observed_by_torch(model: nn.Module) -> nn.Module:
    """torch.ao's FX mode with its default observers."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (X[:1],))


def grown(net: str, kind: str) -> float:
    """MiB at the peak of 6 steps above those before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = stepper(made(net, kind))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(6):
        step()
    return (resident("VmHWM") - before) / 2**20


def memory_rows(tries: int) -> list[str]:
    """Medians over processes; the second column with memory given back to the system as it is freed."""
    lines = []
    for net in NETS:
        floats = [_in_own_process(net, "float", tries, kept) for kept in (True, False)]
        for kind in [name + end for name in IN_MEMORY for end in ("", SAVING)] + ["torch.ao"]:
            found = [_in_own_process(net, kind, tries, kept) for kept in (True, False)]
            ratios = [f"{a:.0f} / {b:.0f} = {a / b:.2f}" for a, b in zip(found, floats, strict=True)]
            lines.append(f"| {net} | {kind} | {' | '.join(ratios)} |")
    return lines


def _in_own_process(net: str, kind: str, tries: int, kept: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.models.quant_step", "--one", net, kind]
    # A fixed threshold keeps glibc from holding on to large pieces.
    environment = dict(os.environ) if kept else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        for _ in range(tries)
    ]
    return statistics.median(float(output.split()[-1]) for output in outputs)


def report(rounds: int) -> str:
    """All tables."""
    parts = [
        "# What quantization-aware training costs", "",
        f"{datetime.date.today()}; {machine()}", "",
        "`python -m benchmarks.models.quant_step`: batch 16 of 3x64x64, one thread, process-CPU time, median of ratios",
        "to float in the same round, and quartiles. Int8 weights per channel, activations per tensor, observed.", "",
        "| model | quantized | step / float step | quartiles |", "|---|---|---|---|", *step_rows(rounds), "",
        "Calibration of ResNet-18 on 8 batches, with all quantizers that onnxruntime fuses and the choice of ranges at",
        "the end (torch.ao: forwards alone):", "",
        "| ranges by | calibration / float forwards |", "|---|---|", *calibration_rows(max(3, rounds // 2)), "",
        "Growth of resident memory in MiB over 6 steps, ours / float; with glibc's default, which keeps freed memory,",
        "and with MALLOC_MMAP_THRESHOLD_=131072, which gives it back:", "",
        "| model | quantized | default | given back |", "|---|---|---|---|", *memory_rows(2),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        print(grown(*arguments.one))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(arguments.rounds)
    print(text)
    if arguments.report:
        path = arguments.report / f"{datetime.date.today()}-quant-step.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
