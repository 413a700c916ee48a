# SPDX-License-Identifier: Apache-2.0
"""``import fxslim`` stays light."""

import subprocess
import sys

HEAVY = ["torchvision", "onnx", "onnxruntime", "optuna", "matplotlib", "rich", "tensorboard", "pandas", "scipy", "tqdm"]
CODE = """
import sys, torch
before = set(sys.modules)
import fxslim
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not torch.cuda.is_initialized()
print(*new)
"""


def test_import_loads_nothing_heavy_and_starts_no_cuda() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not set(result.stdout.split()) & set(HEAVY)
