# SPDX-License-Identifier: Apache-2.0
"""The main job, start to end: train a small network on real images, compress it, write files that run fast.

Half of the multiply-adds is pruned away and the result proved equal to the silenced original. Then the network keeps
2 of every 4 weights, learns to compute with integers, and is exported. The table compares the ONNX files that were
written, as ONNX Runtime runs them.

    python examples/digits_demo.py [--epochs 6] [--dense] [--out runs/demo]

``--dense`` leaves the masks out, which no CPU makes use of (docs/choosing.md says what to take for which target).
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from digits_data import load_digits
from small_resnet import SmallResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import fxslim
from fxslim.export import OnnxVerification, export_onnx
from fxslim.nn import WeightQuant
from fxslim.schedules import CosineSchedule

STAGES = ("float", "pruned", "compressed")


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, ...],
    epochs: int,
    lr: float,
    log: SummaryWriter,
    tag: str,
) -> None:
    images, labels = data[:2]
    steps = epochs * (len(labels) // 64)
    schedule = CosineSchedule(start=lr, end=0.0, steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        model.train()
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = schedule.value_at(step)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add_scalar(f"{tag}/loss", loss.item(), step)


def make_stages(folder: Path, data: tuple[Tensor, ...], epochs: int, dense: bool) -> None:
    """Train, prune, mask (unless it is to stay dense) and quantize; save the model after each stage."""
    log = SummaryWriter(str(folder / "tensorboard"))
    example = data[2][:2]
    shorter = max(1, epochs // 2)

    print(f"training on {len(data[1])} images of digits, testing on {len(data[3])}")
    model = SmallResNet()
    train(model, sgd(model), data, epochs, 0.05, log, "float")
    fxslim.save(model, folder / "float.safetensors")

    plan = fxslim.plan_pruning(model, example, ratio=0.5)
    print(f"\n{plan}\n")
    print(f"pruned against its silenced original: {plan.verify(model, [example, data[2][2:5]])}")
    plan.apply(model)
    train(model, sgd(model), data, shorter, 0.02, log, "pruned")
    fxslim.save(model, folder / "pruned.safetensors")

    print(f"{'' if dense else 'masked to 2:4 and '}quantized to integers; fine-tuning\n")
    optimizer = sgd(model)
    if not dense:
        fxslim.sparsify(model, "2:4")
    # Weights of 7 bits: x86 processors without VNNI add two products in 16 bits, where those of 8 bits may saturate.
    config = fxslim.QuantConfig(weight=WeightQuant(bits=7))
    fxslim.prepare_qat(model, config, optimizer=optimizer, target="onnxruntime", example_inputs=example)
    train(model, optimizer, data, shorter, 0.01, log, "compressed")
    fxslim.save(model, folder / "compressed.safetensors")
    log.close()


def export(folder: Path, stage: str, images: Tensor) -> OnnxVerification:
    """Rebuild a stage from its saved file, and write it as an ONNX file that was compared with it on the images."""
    model = fxslim.load(SmallResNet(), folder / f"{stage}.safetensors")
    path = folder / f"{stage}.onnx"
    return export_onnx(model, images, path, input_names=["image"], dynamic_shapes=({0: "batch"},))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def latencies_ms(paths: list[Path], image: np.ndarray, rounds: int = 200) -> list[float]:
    """The median time of one image for each file; they take turns, so that a busy moment hits all of them."""
    sessions = [open_session(path) for path in paths]
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, own in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(None, {"image": image})
            own.append(time.perf_counter() - start)
    return [statistics.median(own) * 1e3 for own in seconds]


def measure(path: Path, images: Tensor, labels: Tensor) -> dict[str, str]:
    """A row of the table, from the file alone."""
    (scores,) = open_session(path).run(None, {"image": images.numpy()})
    tensors = [onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]
    weights = [tensor for tensor in tensors if tensor.ndim >= 2]
    return {
        "accuracy": f"{np.mean(scores.argmax(1) == labels.numpy()):.2%}",
        "weights": f"{sum(weight.size for weight in weights):,}",
        "not 0": f"{sum(np.count_nonzero(weight) for weight in weights):,}",
        "stored as": weights[0].dtype.name,
        "file bytes": f"{path.stat().st_size:,}",
    }


def print_table(rows: dict[str, dict[str, str]]) -> None:
    columns = list(next(iter(rows.values())))
    print("\n" + " " * 12 + "".join(f"{column:>12}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:12}" + "".join(f"{cell:>12}" for cell in cells.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--dense", action="store_true", help="no masks")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = load_digits()
    make_stages(options.out, data, options.epochs, options.dense)

    _, _, images, labels = data
    for stage in STAGES:
        found = export(options.out, stage, images[:64])
        print(f"{stage}.onnx beside torch: relative error {found.relative:.1e}, same answer {found.argmax:.1%}")
    files = [options.out / f"{stage}.onnx" for stage in STAGES]
    rows = {stage: measure(file, images, labels) for stage, file in zip(STAGES, files, strict=True)}
    times = latencies_ms(files, images[:1].numpy())
    for row, milliseconds in zip(rows.values(), times, strict=True):
        row["latency ms"] = f"{milliseconds:.3f}"
    print_table(rows)
    smaller = files[0].stat().st_size / files[-1].stat().st_size
    faster = times[0] / times[-1]
    print(f"\nThe compressed file is {smaller:.1f}x smaller, {faster:.1f}x faster in ONNX Runtime on one thread.")
    zeros = "." if options.dense else "; the zeros of 2:4 are for hardware that skips them."
    print(f"Channels that are gone and integers make it so{zeros}")
    print(f"Wrote {', '.join(str(f) for f in files)}, a .safetensors beside each, and {options.out}/tensorboard.")


if __name__ == "__main__":
    main()
