# SPDX-License-Identifier: Apache-2.0
"""Prunes torchvision's convolutional models without help for any of them, and proves each result.

    python -m benchmarks.models.zoo [--only GLOB] [--effects] [--report FOLDER]

Every parameter and buffer is randomised first (norm statistics, biases and layer scales of order 1).
``--effects`` also measures the smallest effect of removing one group alone (slow).
"""

import argparse
import datetime
import fnmatch
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model, list_models

import fxslim
from benchmarks.timing import machine
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.verification import VISIBLE, verify_cuts

OTHER_KINDS = ("quantized", "vit", "swin", "maxvit", "rcnn", "retina", "fcos", "ssd", "raft", "mvit")
SMALL_VIDEO = (1, 3, 8, 64, 64)
VIDEO = {"s3d": (1, 3, 16, 224, 224), "mc3_18": SMALL_VIDEO, "r3d_18": SMALL_VIDEO, "r2plus1d_18": SMALL_VIDEO}
# The auxiliary head of Inception needs the size that the model is made for.
SIZES = {"inception_v3": 299}


def randomise(model: nn.Module) -> nn.Module:
    """Norms, biases and scales of order 1, so that a wrong mapping can't hide behind mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    for name, state in [*model.named_parameters(), *model.named_buffers()]:
        if state.is_floating_point() and name.endswith("running_var"):
            state.data = torch.rand(state.shape, generator=generator) + 0.5
        elif state.is_floating_point() and (state.dim() <= 1 or name.endswith("layer_scale")):
            centre = 1.0 if "weight" in name else 0.0
            state.data = torch.randn(state.shape, generator=generator) * 0.5 + centre
    return model


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and example inputs in two resolutions."""
    settings = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    model = randomise(get_model(name, weights=None, **settings))
    if name in VIDEO:
        return model, torch.randn(VIDEO[name]), torch.randn(VIDEO[name])
    size = SIZES.get(name, 64)
    return model, torch.randn(1, 3, size, size), torch.randn(1, 3, size + 32, size + 32)


def smallest_effect(model: nn.Module, plan: fxslim.PruningPlan, x: Tensor) -> float:
    """The smallest visible effect of one group's removals alone."""
    graph = fxslim.trace(model, x)
    effects = []
    for group in graph.groups:
        places = {slot.key for slot in group.slots}
        alone: list[Cut] = [cut for cut in plan.cuts if (cut.name, cut.dim) in places]
        if alone and all(slot.role != "producer" or len(slot.ids) == len(group) for slot in group.slots):
            effects.append(verify_cuts(model, alone, x).effect)
    return min(effects, default=float("nan"))


def row(name: str, importance: str, effects: bool) -> tuple[bool, str]:
    """One line of the report, and whether the model passed."""
    model, x, other = build(name)
    start = time.process_time()
    plan = fxslim.plan_pruning(model, x, ratio=0.5, importance=importance)
    seconds = time.process_time() - start
    proof = plan.verify(model, [x, other])
    graph = fxslim.trace(model, x)
    cut = {c.name.rpartition(".")[0] for c in plan.cuts}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    smallest = f"{smallest_effect(model, plan, x):.1e}" if effects else ""
    plan.apply(model)
    model.train()(torch.cat([x, x]))
    reasons = sorted({reason.rpartition(" in ")[0] or reason for reason in graph.frozen_layers().values()})
    verdict = "OK" if proof.ok else "VACUOUS" if proof.effect < VISIBLE else "DIFFERS"
    cells = [
        name,
        verdict,
        f"{plan.macs[1] / plan.macs[0]:.3f}",
        f"{plan.params[1] / plan.params[0]:.3f}",
        f"{sum(n in cut for n in layers)}/{len(layers)}",
        f"{proof.relative:.0e}",
        f"{proof.effect:.0e}",
        smallest,
        f"{seconds:.2f}",
        "; ".join(reasons),
    ]
    text = "| " + " | ".join(cells) + " |"
    return proof.ok, text


def rows(only: str, importance: str, effects: bool) -> Iterator[tuple[bool, str]]:
    for name in list_models():
        if any(kind in name for kind in OTHER_KINDS) or not fnmatch.fnmatch(name, only):
            continue
        try:
            result = row(name, importance, effects)
        except Exception as error:
            first = str(error).splitlines()[0][:160]
            result = False, f"| {name} | FAILED | | | | | | | | {type(error).__name__}: {first} |"
        print(result[1], flush=True)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--importance", default="random")
    parser.add_argument("--effects", action="store_true")
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    results = list(rows(options.only, options.importance, options.effects))
    passed = sum(ok for ok, _ in results)
    head = [
        f"# Torchvision's convolutional models, {datetime.date.today()}", "", machine(), "",
        f"{passed} of {len(results)} pruned to half their macs ({options.importance} choice), equal to the silenced",
        "original in float64 on two resolutions, and run in train mode afterwards. `relative` is the largest",
        "difference over the largest output, `effect` that of the removal itself, seconds are CPU time of planning.",
        "Reproduce with `make zoo`.", "",
        "| model | | macs kept | params kept | layers cut | relative | effect | smallest group | s | frozen because |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-zoo.md"
    path.write_text("\n".join([*head, *(text for _, text in results), ""]))
    print(f"{passed} of {len(results)} passed; wrote {path}")


if __name__ == "__main__":
    main()
