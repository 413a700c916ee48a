# SPDX-License-Identifier: Apache-2.0
"""2:4 weights for NVIDIA GPUs: which are taken, and what becomes of the others. Where there is no GPU, by stand-ins."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.deploy import sparse_choice
from fxslim.nn import MaskedLinear
from fxslim.nn.semi_structured_linear import SemiStructuredLinear, why_not_semi_structured


class OnGpu:
    """As much of a weight on a GPU as the rule looks at."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, SimpleNamespace(type=device)
        self.dim = lambda: len(shape)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (OnGpu(64, 128, device="cpu"), "2:4 brings no speed on cpu, only on NVIDIA GPUs"),
        (OnGpu(64, 128, dtype=torch.float32), "2:4 kernels take float16 and bfloat16, not torch.float32"),
        (OnGpu(64, 128, 3, 3), "torch has 2:4 kernels for linear layers only"),
        (OnGpu(48, 128), "2:4 kernels take multiples of 32x64, not 48x128"),
        (OnGpu(64, 96), "2:4 kernels take multiples of 32x64, not 64x96"),
    ],
)
def test_weights_that_the_kernels_do_not_take(weight: Any, why: str) -> None:
    assert why_not_semi_structured(weight) == why


def fitting(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, list[Tensor]]:
    """A model whose layers the rule takes, and the weights that are compressed."""
    compressed: list[Tensor] = []
    monkeypatch.setattr(sparse_choice, "why_not_semi_structured", lambda weight: "")
    monkeypatch.setattr(SemiStructuredLinear, "has_kernel", lambda layer, x: True)
    monkeypatch.setattr(
        torch.sparse, "to_sparse_semi_structured", lambda weight: compressed.append(weight) or weight.clone()
    )
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    return fxslim.sparsify(model, "2:4"), compressed


def test_layers_are_compressed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, compressed = fitting(monkeypatch)
    twin, x = copy.deepcopy(model), torch.randn(5, 128)
    plan = fxslim.plan_convert(model, example_inputs=x)
    assert [one.kernel for one in plan.layers] == ["2:4", "2:4"]
    assert not plan.notes
    plan.apply(model)
    compressed.clear()
    with torch.no_grad():
        expected = twin(x)
        for net in (model, model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.allclose(net(x), expected, atol=1e-6)
    # Two layers, of the model and of each copy.
    assert len(compressed) == 6
    fxslim.save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    loaded = fxslim.load(fresh, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_another_weight_is_compressed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compressed = fitting(monkeypatch)
    layer = SemiStructuredLinear(MaskedLinear(64, 32, pattern="2:4"))
    x = torch.randn(1, 64)
    before = layer(x)
    layer.weight.mul_(2)
    assert not torch.allclose(layer(x), before)
    assert len(compressed) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_gpu_the_weight_is_dense(dtype: torch.dtype) -> None:
    plain = MaskedLinear(64, 32, pattern="2:4")
    layer, x = SemiStructuredLinear(plain), torch.randn(3, 64)
    assert torch.allclose(layer(x.to(dtype)).float(), plain(x), atol=1e-6)
    assert layer(torch.zeros(0, 64)).shape == (0, 32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels are those of NVIDIA GPUs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    plain = MaskedLinear(128, 64, pattern="2:4").cuda().to(dtype)
    x = torch.randn(17, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = plain(x)
    model = fxslim.convert(plain)
    assert isinstance(model, SemiStructuredLinear)
    assert (model(x) - expected).norm() <= 0.01 * expected.norm()
