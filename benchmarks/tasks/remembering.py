# SPDX-License-Identifier: Apache-2.0
"""Results on disk, filed under what they were made from, so that a rerun continues and nothing stale is read."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxslim.plan.file_writing import write_file

SOURCES = ("glyphs.py", "networks.py", "training.py")


def digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:20]


def code_digest(paths: Iterable[Path]) -> str:
    """Of Python files; comments and formatting do not count."""
    return digest(*(ast.dump(ast.parse(path.read_text())) for path in paths))


def source_digest() -> str:
    """Of the code that makes images, networks and training."""
    return code_digest(Path(__file__).parent / name for name in SOURCES)


def model_digest(model: nn.Module) -> str:
    """Of all weights and buffers, their shapes, and the numbers that modules keep as attributes."""
    found = hashlib.sha256()
    for name, state in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(state.shape)} {state.dtype}".encode())
        found.update(state.detach().cpu().contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float, tuple)}
        found.update(f"{name} {type(module).__name__} {sorted(numbers.items())}".encode())
    return found.hexdigest()[:20]


class Memory:
    """A folder of numbers and of weights; each is made once and written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def number(self, key: str, make: Callable[[], float]) -> float:
        return float(self._kept(key, make))

    def numbers(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Several that are made at once, by name."""
        return {name: float(value) for name, value in self._kept(key, make).items()}

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{key}.json"
        if not path.exists():
            text = json.dumps(make())
            write_file(path, lambda temporary: temporary.write_text(text))
        return json.loads(path.read_text())

    def tensor(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            made = make().contiguous()
            write_file(path, lambda temporary: save_file({"tensor": made}, temporary))
        return load_file(path)["tensor"]

    def weights(self, key: str, model: nn.Module, make: Callable[[nn.Module], object]) -> nn.Module:
        """The model with the weights that ``make`` gave it, now or in an earlier run."""
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            make(model)
            states = {name: state.contiguous() for name, state in model.state_dict().items()}
            write_file(path, lambda temporary: save_file(states, temporary))
        model.load_state_dict(load_file(path))
        return model.eval()
