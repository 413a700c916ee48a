# SPDX-License-Identifier: Apache-2.0
"""Prunes torchvision's models without help for any of them, and proves each result.

    python -m benchmarks.models.zoo [--only GLOB] [--effects] [--report FOLDER]

Every parameter and buffer is randomised first (norm statistics, biases and layer scales of order 1).
``--effects`` also measures the smallest effect of removing one group alone, a forward for each.
"""

import argparse
import copy
import datetime
import fnmatch
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model, list_models

import fxslim
from benchmarks.models import detectors
from benchmarks.timing import machine
from fxslim import Inputs
from fxslim.graph.inputs import output_tensors
from fxslim.graph.recording import named_states, undisturbed
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.silencing import NormsOverKept, silence
from fxslim.pruning.verification import VISIBLE

SMALL_VIDEO = (1, 3, 8, 64, 64)
# The smallest that each of these models takes; all others take pictures of 64 pixels.
SHAPES = {
    "s3d": (1, 3, 16, 224, 224),
    "mc3_18": SMALL_VIDEO,
    "r3d_18": SMALL_VIDEO,
    "r2plus1d_18": SMALL_VIDEO,
    "swin3d": (1, 3, 4, 64, 64),
    "mvit": (1, 3, 16, 224, 224),
    "vit": (1, 3, 224, 224),
    "maxvit": (1, 3, 224, 224),
    # The auxiliary head of Inception needs the size that the model is made for.
    "inception_v3": (1, 3, 299, 299),
    "raft": (1, 3, 128, 128),
}
ONE_SIZE = ("s3d", "mvit", "vit", "maxvit", "mc3_18", "r3d_18", "r2plus1d_18")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model in eval mode and what to run it on; ``train_inputs`` where training needs others than a batch of two.

    ``at`` names layers whose outputs are compared too.
    """

    model: nn.Module
    inputs: Any
    other: Any
    train_inputs: Any = None
    at: tuple[str, ...] = ()


def randomise(model: nn.Module) -> nn.Module:
    """All of order 1: a wrong mapping can't hide behind mean 0 and variance 1, nor an effect behind small weights."""
    generator = torch.Generator().manual_seed(0)
    for name, state in [*model.named_parameters(), *model.named_buffers()]:
        if state.is_floating_point() and name.endswith("running_var"):
            state.data = torch.rand(state.shape, generator=generator) + 0.5
        elif state.is_floating_point() and (state.dim() <= 1 or name.endswith("layer_scale")):
            centre = 1.0 if "weight" in name else 0.0
            state.data = torch.randn(state.shape, generator=generator) * 0.5 + centre
        elif state.is_floating_point():
            gain = (2 / state[0].numel()) ** 0.5
            state.data = torch.randn(state.shape, generator=generator) * gain
    return model


def settle_norms(model: nn.Module, inputs: Inputs) -> None:
    """Running statistics near those of real activations: a deep model neither fades nor turns chaotic.

    Each norm gets them as the activations reach it, behind norms that have theirs: what is near, and not equal, would
    else add up to another scale in each block. In eval mode, which they are for: stochastic depth has other ones.
    """
    generator = torch.Generator().manual_seed(1)

    def settle(norm: Any, given: tuple[Tensor]) -> None:
        handles_of[norm].remove()
        values = given[0].transpose(0, 1).flatten(1)
        spread = values.var(1, correction=0).clamp(min=0.1)
        centre = values.mean(1) + torch.randn(spread.shape, generator=generator) * 0.3 * spread.sqrt()
        norm.running_mean.copy_(centre)
        norm.running_var.copy_(spread * (torch.rand(spread.shape, generator=generator) + 0.5))

    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    handles_of = {norm: norm.register_forward_pre_hook(settle) for norm in norms}
    if norms:
        with torch.no_grad():
            inputs.run(model.eval())
    for handle in handles_of.values():
        handle.remove()
    model.eval()


def build(name: str) -> Example:
    """A model and example inputs, in two resolutions where it takes them."""
    if name in detectors.NAMES:
        found = detectors.build(name)
        train_inputs = Inputs(*found.train_inputs)
        inputs, other = Inputs(*found.inputs), Inputs(found.train_inputs[0])
        return Example(model=found.model, inputs=inputs, other=other, train_inputs=train_inputs, at=found.outputs)
    settings = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    model = randomise(get_model(name, weights=None, **settings))
    kind = next((kind for kind in (name, name.partition("_")[0]) if kind in SHAPES), "")
    shape = SHAPES.get(kind, (1, 3, 64, 64))
    larger = shape if kind in ONE_SIZE else (*shape[:-2], shape[-2] + 32, shape[-1] + 32)
    # Statistics of few pictures fit these and no others, a bit more in each norm behind another.
    many = (64 if shape[-1] < 224 and len(shape) == 4 else 2, *shape[1:])
    settle_norms(model, _example(name, many))
    return Example(model=model, inputs=_example(name, shape), other=_example(name, larger))


def _example(name: str, shape: tuple[int, ...]) -> Inputs:
    if name.startswith("raft"):
        return Inputs(torch.randn(shape), torch.randn(shape), num_flow_updates=2)
    return Inputs(torch.randn(shape))


def smallest_effect(model: nn.Module, graph: fxslim.ChannelGraph, x: Tensor) -> float:
    """The smallest effect of removing every other channel of one group, each group alone."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    states = dict(named_states(twin))
    # A unit that is silent on one input may speak on another; auxiliary heads are seen in training only.
    varied = torch.cat([x, 3 * x.flip(-1), 0.2 * x + 1, 0.5 - x])
    looks = [(False, x), (False, varied), (True, varied)]
    whole = [_outputs(twin, seen, training) for training, seen in looks]
    effects = []
    for group in graph.groups:
        cuts = _every_other(group, graph)
        saved = {cut.name: states[cut.name].detach().clone() for cut in cuts if cut.name in states}
        silence(twin, cuts)
        effect = 0.0
        for (training, seen), before in zip(looks, whole, strict=True):
            if effect < VISIBLE:
                with NormsOverKept(twin, cuts):
                    changed = _outputs(twin, seen, training)
                effect = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, changed, strict=True))
        effects.append(effect)
        with torch.no_grad():
            for name, value in saved.items():
                states[name].copy_(value)
    return min(effects, default=0.0)


def _outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    with undisturbed(model, training=training), torch.no_grad():
        return output_tensors(model(x))


def _every_other(group: fxslim.ChannelGroup, graph: fxslim.ChannelGraph) -> list[Cut]:
    """Cuts that remove every other channel of one group."""
    cuts = []
    for slot in group.slots:
        keep = np.flatnonzero(~np.isin(graph.resolved.of(slot), group.channels[::2]))
        cuts.append(Cut(name=slot.name, dim=slot.dim, keep=tuple(keep.tolist()), blocks=slot.blocks))
    return cuts


def free_share(graph: fxslim.ChannelGraph, layers: list[str]) -> float:
    """The share of layers that have a removable channel, of those that do not make the model's output."""
    free = {name for group in graph.groups for name in group.layers("producer", "depthwise")}
    makes_output = {n for n, why in graph.frozen_layers().items() if why.startswith("model output")}
    others = [n for n in layers if n not in makes_output]
    return sum(n in free for n in others) / max(len(others), 1)


def _doubled(inputs: Inputs) -> Inputs:
    """Each example twice: training needs a batch."""
    return Inputs(*(torch.cat([value, value]) for value in inputs.args), **inputs.kwargs)


def row(name: str, importance: str, effects: bool) -> tuple[bool, str]:
    """One line of the report, and whether the model passed."""
    example = build(name)
    model, train_inputs = example.model, example.train_inputs
    start = time.process_time()
    plan = fxslim.plan_pruning(model, example.inputs, ratio=0.5, importance=importance, train_inputs=train_inputs)
    seconds = time.process_time() - start
    proof = plan.verify(model, [example.inputs, example.other], at=example.at, train_inputs=train_inputs)
    graph = fxslim.trace(model, example.inputs, train_inputs=train_inputs)
    cut = {c.name.rpartition(".")[0] for c in plan.cuts}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    effects = effects and len(example.inputs.args) == 1 and isinstance(example.inputs.args[0], Tensor)
    smallest = smallest_effect(model, graph, example.inputs.args[0]) if effects else float("nan")
    free = free_share(graph, [n for n in layers if n not in example.at])
    plan.apply(model)
    (train_inputs or _doubled(example.inputs)).run(model.train())
    reasons = sorted({reason.rpartition(" in ")[0] or reason for reason in graph.frozen_layers().values()})
    vacuous = proof.effect < VISIBLE or smallest < VISIBLE
    verdict = "DIFFERS" if not proof.ok else "VACUOUS" if vacuous else "OK" if free >= 0.95 else "FROZEN"
    cells = [
        name,
        verdict,
        f"{plan.macs[1] / plan.macs[0]:.3f}",
        f"{plan.params[1] / plan.params[0]:.3f}",
        f"{sum(n in cut for n in layers)}/{len(layers)}",
        f"{free:.0%}",
        f"{proof.relative:.0e}",
        f"{proof.effect:.0e}",
        f"{smallest:.0e}" if effects else "not run",
        f"{seconds:.2f}",
        "; ".join(reasons),
    ]
    return verdict == "OK", "| " + " | ".join(cells) + " |"


def rows(only: str, importance: str, effects: bool) -> Iterator[tuple[bool, str]]:
    for name in list_models():
        if name.startswith("quantized") or not fnmatch.fnmatch(name, only):
            continue
        try:
            result = row(name, importance, effects)
        except Exception as error:
            first = str(error).splitlines()[0][:160]
            result = False, f"| {name} | FAILED | | | | | | | | | {type(error).__name__}: {first} |"
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
    torch.set_num_threads(1)
    results = list(rows(options.only, options.importance, options.effects))
    passed = sum(ok for ok, _ in results)
    head = [
        f"# Torchvision's models, {datetime.date.today()}", "", machine(), "",
        f"{passed} of {len(results)} pruned to half their macs ({options.importance} choice), equal to the silenced",
        "original in float64 on two inputs (of two resolutions where the model takes them), and run in train mode",
        "afterwards. `relative` is the largest",
        "difference over the largest output, `effect` that of the removal itself, `one group` the least effect of",
        "removing every other channel of one group alone (below 1e-3: VACUOUS), `free` the share of layers with",
        "removable channels (below 95 %: FROZEN), seconds are CPU time of planning. Reproduce:",
        f"`python -m benchmarks.models.zoo --importance {options.importance}{' --effects' * options.effects}`.", "",
        "| model | | macs kept | params kept | layers cut | free | relative | effect | one group | s | stays because |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-zoo-{options.importance}.md"
    path.write_text("\n".join([*head, *(text for _, text in results), ""]))
    print(f"{passed} of {len(results)} passed; wrote {path}")


if __name__ == "__main__":
    main()
