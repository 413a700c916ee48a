# SPDX-License-Identifier: Apache-2.0
"""The main job, start to end: train a small network on real images, compress it, compare.

First half of the multiply-adds is pruned away and the result proved equal to the silenced original; then
the network keeps 2 of every 4 weights of each convolution and computes with 8-bit weights and activations
(fake-quantized while training). The table's figures are measured on the files that it writes.

    python examples/digits_demo.py [--epochs 6] [--out runs/demo]
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from digits_data import load_digits
from safetensors.torch import load_file, save_file
from small_resnet import SmallResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import fxslim
from fxslim import kernels
from fxslim.schedules import CosineSchedule


class SlimConv2d(nn.Conv2d):
    """A convolution with a 2:4 mask, int8 weights per channel and uint8 activations, made from a float one."""

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> "SlimConv2d":
        slim = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
        )
        slim.weight, slim.bias = conv.weight, conv.bias
        maskable = conv.in_channels >= 4
        mask = kernels.nm_mask(conv.weight, 2, 4) if maskable else torch.ones_like(conv.weight, dtype=torch.bool)
        slim.register_buffer("mask", mask)
        slim.register_buffer("range_min", torch.tensor([torch.inf]))
        slim.register_buffer("range_max", torch.tensor([-torch.inf]))
        slim.register_buffer("nothing", torch.full((conv.out_channels,), torch.inf))
        return slim

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """The weight that is computed with, and its scale per output channel."""
        weight, _, _, scale, _ = kernels.observe_fake_quantize(
            self.weight * self.mask, self.nothing, -self.nothing, -128, 127, averaging=1.0, symmetric=True, axis=0
        )
        return weight, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x, low, high, _, _ = kernels.observe_fake_quantize(x, self.range_min, self.range_max, 0, 255, averaging=0.1)
            self.range_min, self.range_max = low, high
        else:
            # An empty tensor leaves the range as it is and gives its grid.
            empty = x.new_empty(0)
            *_, scale, zero_point = kernels.observe_fake_quantize(empty, self.range_min, self.range_max, 0, 255)
            x = kernels.fake_quantize(x, scale, zero_point, 0, 255)
        return F.conv2d(x, self.quantized_weight()[0], self.bias, self.stride, self.padding)


def convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def compress(model: nn.Module) -> nn.Module:
    """Replace every convolution by its compressed counterpart, in place."""
    for name, conv in convolutions(model):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, SlimConv2d.from_float(conv))
    return model


def train(model: nn.Module, data: tuple[Tensor, ...], epochs: int, lr: float, log: SummaryWriter, tag: str) -> None:
    images, labels, test_images, test_labels = data
    steps = epochs * (len(labels) // 64)
    schedule = CosineSchedule(start=lr, end=0.0, steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        model.train()
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        optimizer.param_groups[0]["lr"] = schedule.value_at(step)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add_scalar(f"{tag}/loss", loss.item(), step)
        if (step + 1) % (len(labels) // 64) == 0:
            log.add_scalar(f"{tag}/test_accuracy", accuracy(model, test_images, test_labels), step)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def latency_ms(model: nn.Module, image: Tensor) -> float:
    model.eval()
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        model(image)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Multiply-adds of the convolutions and the classifier: all, and those by a weight that is not 0."""
    counts = [0, 0]

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        counts[0] += module.weight.numel() * positions
        counts[1] += int((module.weight * getattr(module, "mask", 1)).count_nonzero()) * positions

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.eval()(image)
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1]


def save_compressed(model: nn.Module, path: Path) -> None:
    """int8 weights and scales; of a masked weight the kept values and one bit per position."""
    tensors = dict(model.state_dict())
    for name, conv in convolutions(model):
        weight, scale = conv.quantized_weight()
        steps = (weight / scale.reshape(-1, 1, 1, 1)).round().to(torch.int8)
        for suffix in ("weight", "mask", "nothing"):
            del tensors[f"{name}.{suffix}"]
        tensors |= {f"{name}.steps": steps[conv.mask], f"{name}.scale": scale}
        tensors[f"{name}.kept"] = torch.from_numpy(np.packbits(conv.mask.numpy()))
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)


def load_compressed(model: nn.Module, path: Path) -> nn.Module:
    """The model of ``save_compressed``, rebuilt from a fresh float one."""
    tensors = load_file(path)
    compress(model)
    for name, conv in convolutions(model):
        bits = torch.from_numpy(np.unpackbits(tensors.pop(f"{name}.kept").numpy()))
        conv.mask = bits[: conv.mask.numel()].bool().view(conv.mask.shape)
        steps = torch.zeros(conv.mask.shape)
        steps[conv.mask] = tensors.pop(f"{name}.steps").float()
        tensors[f"{name}.weight"] = steps * tensors.pop(f"{name}.scale").reshape(-1, 1, 1, 1)
        tensors |= {f"{name}.mask": conv.mask, f"{name}.nothing": conv.nothing}
    model.load_state_dict(tensors)
    return model


def measure(model: nn.Module, file: Path, images: Tensor, labels: Tensor) -> dict[str, str]:
    """One row of the table."""
    macs, useful = count_macs(model, images[:1])
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    kept = sum(int((m.weight * getattr(m, "mask", 1)).count_nonzero()) for m in layers)
    return {
        "accuracy": f"{accuracy(model, images, labels):.2%}",
        "macs": f"{macs:,}",
        "macs not by 0": f"{useful:,}",
        "weights not 0": f"{kept:,}",
        "file bytes": f"{file.stat().st_size:,}",
        "latency ms": f"{latency_ms(model, images[:1]):.2f}",
    }


def print_table(rows: dict[str, dict[str, str]]) -> None:
    columns = list(next(iter(rows.values())))
    print("\n" + " " * 12 + "".join(f"{column:>16}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:12}" + "".join(f"{cell:>16}" for cell in cells.values()))


def load_pruned(folder: Path) -> nn.Module:
    """The pruned network from its files: a fresh model, the plan, the weights."""
    model = fxslim.load_plan(folder / "plan.json").apply(SmallResNet())
    model.load_state_dict(load_file(folder / "pruned.safetensors"))
    return model


def make_all(folder: Path, data: tuple[Tensor, ...], epochs: int) -> None:
    """Train, prune, compress; write a file for each stage."""
    log = SummaryWriter(str(folder / "tensorboard"))
    model = SmallResNet()
    print(f"training on {len(data[1])} images of digits, testing on {len(data[3])}")
    train(model, data, epochs, 0.05, log, "float")
    save_file(model.state_dict(), folder / "float.safetensors")

    example = data[2][:2]
    plan = fxslim.plan_pruning(model, example, ratio=0.5)
    print(f"\n{plan}\n")
    print(f"pruned against its silenced original: {plan.verify(model, [example, data[2][2:5]])}")
    plan.apply(model)
    plan.save(folder / "plan.json")
    train(model, data, max(1, epochs // 2), 0.02, log, "pruned")
    save_file(model.state_dict(), folder / "pruned.safetensors")

    compress(model)
    print("compressed to 2:4 and int8; fine-tuning")
    train(model, data, max(1, epochs // 2), 0.01, log, "compressed")
    save_compressed(model, folder / "compressed.safetensors")
    log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = load_digits()
    make_all(options.out, data, options.epochs)

    before = SmallResNet()
    before.load_state_dict(load_file(options.out / "float.safetensors"))
    stages = {"float": before, "pruned": load_pruned(options.out)}
    stages["compressed"] = load_compressed(load_pruned(options.out), options.out / "compressed.safetensors")
    files = {name: options.out / f"{name}.safetensors" for name in stages}
    print_table({name: measure(model, files[name], *data[2:]) for name, model in stages.items()})
    smaller = files["float"].stat().st_size / files["compressed"].stat().st_size
    print(f"\nThe file is {smaller:.1f}x smaller. The last row computes in fake-quantized float here, which is slower")
    print("than float: integer speed comes with the deployable form.")
    print(f"Wrote {', '.join(str(f) for f in files.values())}, {options.out}/plan.json and {options.out}/tensorboard.")


if __name__ == "__main__":
    main()
