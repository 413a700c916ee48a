# SPDX-License-Identifier: Apache-2.0
"""A whole model without three quarters of its blocks, beside the fastest dense forms and channel pruning.

    python -m benchmarks.models.sparse_models [--only resnet50] [--ratios 0.5 0.75] [--rounds 15] [--report FOLDER]

One thread, process-CPU time; contestants take turns in one process, figures are medians of ratios in the same round.
"""

import argparse
import copy
import datetime
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import get_model

import fxslim
from benchmarks.models.zoo import settle_norms
from benchmarks.timing import machine, median_ratio, take_turns

MODELS = ("resnet50", "vgg16_bn", "resnet18")
# Outputs that differ by more than this share of the masked model's come from something else.
TOLERANCE = 1e-4


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def folded(model: nn.Module) -> nn.Module:
    """Batch norms become part of convolutions, as torch does it."""
    return channels_last(fuse(copy.deepcopy(model), no_trace=False))


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile of the folded model, warmed up."""
    call: Callable[[Tensor], Tensor] = torch.compile(folded(model))
    for _ in range(3):
        call(x)
    return call


def sparse_macs(plan: fxslim.ConvertPlan) -> str:
    """How many layers skip blocks."""
    return f"{sum('block-sparse' in one.kernel for one in plan.layers)} of {len(plan.layers)} layers"


def kept_macs(masked: nn.Module, x: Tensor) -> float:
    """The share of multiply-adds that is not with zeros."""
    counted = {"all": 0.0, "kept": 0.0}

    def see(layer: Any, _: object, output: Tensor) -> None:
        weight = layer.masked() if hasattr(layer, "masked") else layer.weight
        positions = output.numel() / weight.shape[0]
        counted["all"] += positions * weight.numel()
        counted["kept"] += positions * int((weight != 0).sum())

    handles = [m.register_forward_hook(see) for m in masked.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    masked(x)
    for handle in handles:
        handle.remove()
    return counted["kept"] / counted["all"]


def contestants(name: str, ratio: float, x: Tensor) -> tuple[dict[str, Callable[[], object]], float, str]:
    """What takes turns, the share of macs that is left, and how many layers skip blocks."""
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    settle_norms(model, fxslim.Inputs(torch.randn(8, *x.shape[1:])))
    masked = fxslim.sparsify(copy.deepcopy(model), "cin32cout64", ratio=ratio)
    kept = kept_macs(masked, x)
    plan = fxslim.plan_convert(masked, example_inputs=x)
    sparse = plan.apply(copy.deepcopy(masked))
    wanted, got = masked(x), sparse(x)
    if not (got - wanted).norm() <= TOLERANCE * wanted.norm():
        raise SystemExit(f"{name}: the converted model is off by {(got - wanted).norm() / wanted.norm():.1e}")
    pruned = fxslim.prune(copy.deepcopy(model), x, ratio=1 - kept, importance="l2")
    lying = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
        "eager": (model, x),
        "channels last": (channels_last(copy.deepcopy(model)), lying),
        "norms folded": (folded(model), lying),
        "torch.compile": (compiled(model, lying), lying),
        "channels pruned": (folded(pruned), lying),
        "block-sparse": (sparse, lying),
    }
    return {key: lambda call=call, x=x: call(x) for key, (call, x) in calls.items()}, kept, sparse_macs(plan)


DENSE = ("eager", "channels last", "norms folded", "torch.compile")


def rows(name: str, ratio: float, batch: int, rounds: int) -> list[str]:
    """Lines of one model."""
    with torch.no_grad():
        made, kept, layers = contestants(name, ratio, torch.randn(batch, 3, 224, 224))
        seconds = take_turns(made, torch.device("cpu"), rounds)
    best = min(DENSE, key=lambda one: statistics.median(seconds[one]))
    lines = []
    for one, times in seconds.items():
        over = median_ratio(seconds[best], times)
        share = kept if one in ("block-sparse", "channels pruned") else 1.0
        note = layers if one == "block-sparse" else "the best dense form" if one == best else ""
        cells = [name, str(batch), f"{ratio:.0%}", one, f"{share:.2f}", f"{statistics.median(times) * 1e3:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{over:.2f}", note]) + " |")
    return lines


def report(models: list[str], ratios: list[float], batches: list[int], rounds: int) -> str:
    """The whole report; lines are printed as they come."""
    lines: list[str] = []
    for name in models:
        for batch in batches:
            for ratio in ratios:
                found = rows(name, ratio, batch, rounds)
                print("\n".join(found), flush=True)
                lines += found
    return "\n".join([
        f"# Whole models without their zero blocks, {datetime.date.today()}", "",
        machine(), "",
        "`python -m benchmarks.models.sparse_models`: 224 pixels, one thread, process-CPU time; contestants take turns",
        f"in one process, medians of {rounds} rounds after two to warm up. Masks are Cin32Cout64 by magnitude on",
        "random weights with norms settled; `channels pruned` is `fxslim.prune` to the same macs, its norms folded.",
        "`over` is the time of the best dense form over that of the row.", "",
        "| model | batch | blocks gone | form | macs kept | ms | over | |", "|---" * 8 + "|", *lines, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["resnet50", "vgg16_bn"], choices=MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = report(options.only, options.ratios, options.batches, options.rounds)
    path = options.report / f"{datetime.date.today()}-sparse-models.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
