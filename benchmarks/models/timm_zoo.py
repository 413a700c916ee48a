# SPDX-License-Identifier: Apache-2.0
"""Prunes one or two architectures of each family in timm without help for any of them, and proves each result.

    python -m benchmarks.models.timm_zoo [--only GLOB...] [--jobs N] [--report FOLDER]

With ``--only``, the lines of all other models stay as they are in a report of the same day.

timm is no part of fxslim's environment: `python -m pip install --no-deps timm huggingface_hub safetensors`
into one that has torch and torchvision. Weights and statistics are random; nothing is downloaded.
"""

import argparse
import datetime
import fnmatch
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.models.zoo import free_share, randomise, settle_norms
from benchmarks.timing import machine
from fxslim.graph.inputs import Inputs, output_tensors
from fxslim.pruning.verification import TOLERANCE, VISIBLE

# Smallest variants; of models whose blocks are all alike, as few blocks as timm lets one ask for.
WHOLE = """
resnet18 resnext50_32x4d res2net50_14w_8s legacy_seresnet18 ecaresnet26t gcresnext26ts resnest14d skresnet18
resnetblur50 resnetv2_50 densenet121 densenetblur121d dla46_c dpn68 hrnet_w18_small vovnet39a
ese_vovnet19b_slim_dw cspresnet50 darknet17 cs3darknet_focus_s efficientnet_b0 mixnet_s mobilenetv2_035
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium mnasnet_small fbnetc_100 tinynet_e
lcnet_035 hardcorenas_a ghostnet_050 ghostnetv2_100 repghostnet_050 regnetx_002 regnety_002 nf_regnet_b0
convnext_atto convnextv2_atto legacy_xception inception_next_atto rexnet_100 repvgg_a0 mobileone_s0 levit_128s
pit_ti_224 poolformer_s12 edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformerv2_s0
efficientvit_b0 efficientvit_m0 fastvit_t8 repvit_m0_9 starnet_s050 fasternet_t0 hgnetv2_b0 selecsls42 vgg11
mambaout_femto shvit_s1 lambda_resnet26t botnet26t_256 coat_lite_tiny
mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224 crossvit_tiny_240 nest_tiny gcvit_xxtiny volo_d1_224
caformer_s18 focalnet_tiny_srf convmixer_768_32
mvitv2_tiny coat_tiny bat_resnext26ts halonet26t regnetz_b16 tresnet_m swiftformer_xs rdnet_tiny nextvit_small
eca_nfnet_l0 resnetv2_50x1_bit
""".split()
TWO_BLOCKS = """
vit_tiny_patch16_224 vit_relpos_small_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 visformer_tiny tnt_s_patch16_224
eva02_tiny_patch14_224 naflexvit_base_patch16_gap convit_tiny
""".split()
BLOCK_BY_STAGE = """
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 twins_svt_small twins_pcpvt_small
pvt_v2_b0 coatnet_pico_rw_224 coatnet_rmlp_nano_rw_224 maxvit_rmlp_pico_rw_256 davit_tiny
tiny_vit_5m_224
""".split()
MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in WHOLE},
    **{name: {"depth": 2} for name in TWO_BLOCKS},
    **{name: {"depths": (1, 1, 1, 1)} for name in BLOCK_BY_STAGE},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1)},
}
SIZES = (64, 128, 224, 256)


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input of the smallest size that it runs on, and another, larger one where the model allows it."""
    import timm

    problem: Exception | None = None
    for size in SIZES:
        for settings in ({"img_size": size}, {}):
            x = torch.randn(1, 3, size, size)
            try:
                model = timm.create_model(name, pretrained=False, num_classes=10, **MODELS[name], **settings).eval()
                with torch.no_grad():
                    model(x)
            except Exception as error:
                problem = error
                continue
            settle_norms(randomise(model), Inputs(torch.randn(64 if size < 224 else 8, *x.shape[1:])))
            return model, x, _second_input(model, size)
    raise ValueError(f"{name} runs on none of {SIZES}: {problem}")


def _second_input(model: nn.Module, size: int) -> Tensor:
    larger = torch.randn(1, 3, size + 32, size + 32)
    try:
        with torch.no_grad():
            model(larger)
    except Exception:
        return torch.randn(1, 3, size, size)
    return larger


def row(name: str) -> str:
    """One line of the report."""
    model, x, other = build(name)
    start = time.process_time()
    plan = fxslim.plan_pruning(model, x, ratio=0.5, importance="random")
    seconds = time.process_time() - start
    proof = plan.verify(model, [x, other])
    graph = fxslim.trace(model, x)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    cut = {c.name.rpartition(".")[0] for c in plan.cuts}
    free = free_share(graph, layers)
    if proof.ok:
        plan.apply(model)
        outputs = output_tensors(model.train()(torch.cat([x, x])))
        torch.stack([out.sum() for out in outputs if out.requires_grad]).sum().backward()
    frozen = [reason for reason in graph.frozen_layers().values() if not reason.startswith("model output")]
    verdict = (
        "DIFFERS" if proof.relative > TOLERANCE
        else "VACUOUS" if proof.effect < VISIBLE
        else "OK" if free >= 0.95
        else "FROZEN"
    )  # fmt: skip
    cells = [
        name,
        ", ".join(f"{key}={value}" for key, value in MODELS[name].items()),
        f"{x.shape[-1]}, {other.shape[-1]}",
        verdict,
        f"{plan.macs[1] / plan.macs[0]:.3f}",
        f"{sum(n in cut for n in layers)}/{len(layers)}",
        f"{free:.0%}",
        f"{proof.relative:.0e}",
        f"{proof.effect:.0e}",
        f"{seconds:.1f}",
        "; ".join(sorted({reason.rpartition(" in ")[0] or reason for reason in frozen}))[:300],
    ]
    return "| " + " | ".join(cells) + " |"


def guarded_row(name: str) -> str:
    """A line for a model that fails, too."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        return row(name)
    except Exception as error:
        told = " ".join(str(error).split())[:400]
        return f"| {name} | | | FAILED | | | | | | | {type(error).__name__}: {told} |"


def _lines_of_others(path: Path, names: list[str]) -> dict[str, str]:
    """Lines that a report of the same day has for other models."""
    found = [line for line in path.read_text().splitlines() if line.startswith("| ")] if path.exists() else []
    lines = {line.split("|")[1].strip(): line for line in found}
    return {name: line for name, line in lines.items() if name in MODELS and name not in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    import timm

    path = options.report / f"{datetime.date.today()}-zoo-timm.md"
    names = sorted({name for glob in options.only for name in fnmatch.filter(MODELS, glob)})
    lines = _lines_of_others(path, names)
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, line in zip(names, pool.map(guarded_row, names), strict=True):
            print(line, flush=True)
            lines[name] = line
    passed = sum("| OK |" in line for line in lines.values())
    head = [
        f"# Architectures of timm {timm.__version__}, {datetime.date.today()}", "", machine(), "",
        f"{passed} of {len(lines)} pruned to half their macs (random choice), equal to the silenced original in",
        f"float64 within {TOLERANCE:.0e} on two inputs (of two sizes where the model takes them), run forward and",
        "backward in train mode afterwards, with 95 % or more of the layers free. `relative` is the largest difference",
        "over the largest output, `effect` that of the removal itself, `free` the share of layers with removable",
        "channels, those that make the output left out (below 95 %: FROZEN, with what keeps them). Seconds are CPU",
        f"time of planning. {len(names)} lines are of the last run, others of earlier ones, maybe of other code.",
        "Reproduce: `make zoo-timm`, without a report of the same day.", "",
        "| model | settings | sizes | | macs kept | layers cut | free | relative | effect | s | stays because |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    options.report.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *(lines[name] for name in sorted(lines)), ""]))
    print(f"{passed} of {len(lines)} passed; wrote {path}")


if __name__ == "__main__":
    main()
