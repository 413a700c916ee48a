# SPDX-License-Identifier: Apache-2.0
"""Quantizes torchvision's classification models without help for any of them, trains two steps, saves and loads each.

    python -m benchmarks.models.quant_zoo [--only GLOB...] [--report FOLDER]

With ``--only``, the lines of all other models stay as they are in a report of the same day. Weights are random, of
order 1 (``benchmarks/models/zoo.py``); nothing is downloaded.
"""

import argparse
import copy
import datetime
import fnmatch
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, list_models

import fxslim
from benchmarks.models.zoo import randomise, settle_norms
from benchmarks.timing import machine
from fxslim.graph.inputs import output_tensors
from fxslim.nn import QuantizedLayer
from fxslim.nn.quantizers import each_activation_quantizer
from fxslim.quantization import switch_quantizers

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Embedding)
# Others run on pictures of 64 pixels. Inception's auxiliary head and MaxViT's windows need theirs.
PIXELS = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
# Of half a step: what a poisoned weight is moved by at most, so that it is rounded to the same place.
POISON = 0.8


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and two pictures."""
    pixels = PIXELS.get(name, 64)
    settings = {"image_size": pixels} if name.startswith("vit_") else {}
    model = get_model(name, weights=None, num_classes=10, **settings)
    x = torch.randn(2, 3, pixels, pixels)
    settle_norms(randomise(model), fxslim.Inputs(torch.cat([x, x.flip(-1)])))
    return model, x


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was seen of one model; ``faults`` is empty where all is well."""

    plan: fxslim.QuantizationPlan
    layers: tuple[int, int]
    activations: int
    planning_seconds: float
    faults: tuple[str, ...]


def prove(model: nn.Module, x: Tensor, folder: Path) -> Proof:
    """Plan, apply, train two steps, save, load into a fresh model, poison the weights' low bits."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    num_layers = sum(isinstance(module, LAYERS) for module in outermost(model))
    start = time.process_time()
    plan = fxslim.plan_quantization(model, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    plan.apply(model, optimizer=optimizer)
    seconds = time.process_time() - start
    faults = [*_trained(model, x, optimizer), *_saved(model, fresh, x, folder / "model.safetensors")]
    del model, optimizer
    faults += poison_faults(fresh, x)
    return Proof(
        plan=plan,
        layers=(sum(isinstance(module, QuantizedLayer) for module in outermost(fresh)), num_layers),
        activations=len(each_activation_quantizer(fresh)),
        planning_seconds=seconds,
        faults=tuple(faults),
    )


def outermost(model: nn.Module) -> list[nn.Module]:
    """All modules but those inside of attention layers."""
    inside = {
        id(child)
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        for child in m.modules()
        if child != m
    }
    return [module for module in model.modules() if id(module) not in inside]


def _trained(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Iterable[str]:
    """Faults of two steps: the first chooses the ranges, the second trains on the grids."""
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.stack([out.square().mean() for out in output_tensors(model(x))]).sum()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        yield f"the loss is {float(loss)}"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            yield f"{name} is not in the optimizer"
        # In self-attention the query's quantizer serves for key and value, too.
        if parameter.grad is None and not name.rpartition(".")[0].endswith((".key_quantizer", ".value_quantizer")):
            yield f"{name} has no gradient"
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield f"{name} has a broken gradient"
        parameter.grad = None
    for name, quantizer in each_activation_quantizer(model).items():
        if not quantizer.is_calibrated:
            yield f"{name} has no range"
    model.eval()


@torch.no_grad()
def _saved(model: nn.Module, fresh: nn.Module, x: Tensor, path: Path) -> Iterable[str]:
    """Faults of saving and loading; ``fresh`` is the loaded model afterwards."""
    expected = model(x)
    if not expected.isfinite().all():
        yield "an output is not finite"
    fxslim.save(model, path)
    fxslim.load(fresh, path).eval()
    path.unlink()
    if not torch.equal(fresh(x), expected):
        yield "the loaded model computes something else"


@torch.no_grad()
def poison_faults(model: nn.Module, x: Tensor) -> Iterable[str]:
    """Faults that show when every quantized weight moves, but not on its grid."""
    quantized, plain = _outputs(model, x)
    moved = sum(
        _poison(layer, name)
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer)
        for name in layer.maskable
    )
    now, now_plain = _outputs(model, x)
    if not torch.equal(now, quantized):
        worst = float((now - quantized).abs().max() / quantized.abs().max())
        yield f"a weight is read past its quantizer: poison shows by {worst:.0e}"
    if not moved or torch.equal(now_plain, plain):
        yield "the poison is none: it does not show in float either"


def _outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """On the grids, and in float."""
    quantized = model(x)
    plain = switch_quantizers(model, False)(x)
    switch_quantizers(model, True)
    return quantized, plain


def _poison(layer: QuantizedLayer, name: str) -> int:
    """Moves a weight within its steps, its ends aside, which decide the scale. How many entries moved."""
    quantizer = layer._modules[f"{name}_quantizer"]
    weight = layer.stored(name)
    assert isinstance(quantizer, fxslim.nn.quantizers.WeightQuantizer)
    scale = quantizer.grid_of(weight)[0]
    whole = quantizer.layout.rows(weight)
    rows = whole.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    steps = (rows / scale[:, None]).round()
    # The product is rounded, too: near the middle between two steps it may fall on either side.
    moved = (steps + (torch.rand_like(rows) - 0.5) * POISON) * scale[:, None]
    moved = torch.where((rows == low) | (rows == high), rows, torch.minimum(torch.maximum(moved, low), high))
    number = int((moved != rows).sum())
    weight.copy_(quantizer.layout.restored(moved.view_as(whole)))
    return number


def row(name: str) -> str:
    """One line of the report."""
    start = time.process_time()
    model, x = build(name)
    with tempfile.TemporaryDirectory() as folder:
        proof = prove(model, x, Path(folder))
    notes = Counter(re.sub(r"\S*\.\S+", "...", note).split(":")[0] for note in proof.plan.notes)
    cells = [
        name,
        "OK" if not proof.faults else "FAULTY",
        str(x.shape[-1]),
        "{}/{}".format(*proof.layers),
        str(proof.activations),
        f"{proof.planning_seconds:.1f}",
        f"{time.process_time() - start:.0f}",
        "; ".join([*proof.faults[:3], *(f"{count} x {note}" for note, count in notes.items())]),
    ]
    return "| " + " | ".join(cells) + " |"


def guarded_row(name: str) -> str:
    """A line for a model that fails, too."""
    torch.manual_seed(0)
    try:
        return row(name)
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        return f"| {name} | FAILED | | | | | | {type(error).__name__}: {told} |"


def _lines_of_others(path: Path, names: list[str]) -> dict[str, str]:
    """Lines that a report of the same day has for other models."""
    found = [line for line in path.read_text().splitlines() if line.startswith("| ")] if path.exists() else []
    lines = {line.split("|")[1].strip(): line for line in found}
    return {name: line for name, line in lines.items() if name != "model" and name not in names}


def _write(path: Path, lines: dict[str, str]) -> int:
    passed = sum("| OK |" in line for line in lines.values())
    head = [
        f"# Torchvision's classification models, quantized, {datetime.date.today()}", "",
        f"{machine()}, torchvision {torchvision.__version__}", "",
        f"{passed} of {len(lines)} planned for ONNX Runtime with example inputs, applied, trained two steps (SGD, a",
        "batch of 2: the first chooses ranges, the second trains; every parameter gets a finite gradient), saved with",
        "`fxslim.save` and loaded into a fresh model of other weights: the same output bit for bit in eval mode. Then",
        "all quantized weights are moved within their steps, the largest of each channel aside: the output must stay",
        "the same bit for bit, and must not when quantization is off. `layers`: quantized of all (an attention layer",
        "is one), `activations`: their quantizers, seconds: CPU time of plan and apply, and of the whole line, on a",
        "loaded machine. Weights are random. Reproduce: `make quant-zoo`.", "",
        "| model | | pixels | layers | activations | planning s | all s | notes |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *(lines[name] for name in sorted(lines)), ""]))
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = options.report / f"{datetime.date.today()}-quant-zoo.md"
    known = list_models(module=torchvision.models)
    names = [name for name in known if any(fnmatch.fnmatch(name, glob) for glob in options.only)]
    lines = _lines_of_others(path, names)
    for name in names:
        lines[name] = guarded_row(name)
        print(lines[name], flush=True)
        passed = _write(path, lines)
    print(f"{passed} of {len(lines)} passed; wrote {path}")


if __name__ == "__main__":
    main()
