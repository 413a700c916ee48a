# SPDX-License-Identifier: Apache-2.0
"""Who competes in which task: native, reference, what torch has, and copy_ as the unit."""

from collections.abc import Callable

import torch
from torch import Tensor

from fxslim.kernels import (
    block_masking,
    clip_masks,
    clipped_fake_quantization,
    fake_quantization,
    float_fake_quantization,
    histogram_observation,
    learned_fake_quantization,
    nm_masking,
    observation,
    observed_fake_quantization,
)

Contest = dict[str, Callable[[], object]]


def _graph(forward: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(*inputs), inputs, grad)


def _copy(x: Tensor) -> Callable[[], object]:
    out, source = torch.empty_like(x), x.detach()
    return lambda: out.copy_(source)


def fake_quantize_per_tensor(device: torch.device) -> Contest:
    """fake_quantize per tensor, 16x64x56x56 float32, forward and backward."""
    x = torch.randn(16, 64, 56, 56, device=device, requires_grad=True)
    grad, plain = torch.randn_like(x), x.detach()
    scale, zero = torch.tensor([0.05], device=device), torch.tensor([3], dtype=torch.int32, device=device)

    def reference() -> Tensor:
        _, mask = fake_quantization._reference(plain, scale, zero, -128, 127, None, False, True)
        return clip_masks._reference(grad, mask, False)

    scale_number = scale.item()
    return {
        "copy_": _copy(x),
        "native": _graph(lambda t: fake_quantization.fake_quantize(t, scale, zero, -128, 127), [x], grad),
        "reference": reference,
        "torch": _graph(lambda t: torch.fake_quantize_per_tensor_affine(t, scale_number, 3, -128, 127), [x], grad),
    }


def observe_and_fake_quantize(device: torch.device) -> Contest:
    """observe_fake_quantize (moving average) per tensor, 16x64x56x56 float32, forward and backward."""
    x = torch.randn(16, 64, 56, 56, device=device, requires_grad=True)
    grad, plain = torch.randn_like(x), x.detach()
    low, high = torch.tensor([-4.0], device=device), torch.tensor([4.0], device=device)

    def reference() -> Tensor:
        outputs = observed_fake_quantization._reference(plain, low, high, 0, 255, 0.01, False, None, False, True)
        return clip_masks._reference(grad, outputs[5], False)

    on, scale = torch.ones(1, dtype=torch.long, device=device), torch.ones(1, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    run_low, run_high = low.clone(), high.clone()

    def torch_op(t: Tensor) -> Tensor:
        return torch.fused_moving_avg_obs_fake_quant(t, on, on, run_low, run_high, scale, zero, 0.01, 0, 255, -1)

    observe = observed_fake_quantization.observe_fake_quantize
    return {
        "copy_": _copy(x),
        "native": _graph(lambda t: observe(t, low, high, 0, 255)[0], [x], grad),
        "reference": reference,
        "torch": _graph(torch_op, [x], grad),
    }


def weights_per_channel(device: torch.device) -> Contest:
    """ARQ: absmax and fake quantize per output channel, 512x512x3x3 float32, forward and backward."""
    weight = torch.randn(512, 512, 3, 3, device=device, requires_grad=True)
    grad, plain = torch.randn_like(weight), weight.detach()
    low, high = torch.full((512,), torch.inf, device=device), torch.full((512,), -torch.inf, device=device)
    on, scale = torch.ones(1, dtype=torch.long, device=device), torch.ones(512, device=device)
    zero = torch.zeros(512, dtype=torch.int32, device=device)
    run_low, run_high = torch.zeros(512, device=device), torch.zeros(512, device=device)

    def torch_op(t: Tensor) -> Tensor:
        return torch.fused_moving_avg_obs_fake_quant(
            t, on, on, run_low, run_high, scale, zero, 1.0, -128, 127, 0, True, True
        )

    def native(t: Tensor) -> Tensor:
        return observed_fake_quantization.observe_fake_quantize(
            t, low, high, -128, 127, averaging=1.0, symmetric=True, axis=0
        )[0]

    def reference() -> object:
        return observed_fake_quantization._reference(plain, low, high, -128, 127, 1.0, True, 0, False, False)

    return {
        "copy_": _copy(weight),
        "native": _graph(native, [weight], grad),
        "reference": reference,
        "torch": _graph(torch_op, [weight], grad),
    }


def learned_scale(device: torch.device) -> Contest:
    """fake_quantize_learned (LSQ) per tensor, 16x64x56x56 float32, forward and backward."""
    x = torch.randn(16, 64, 56, 56, device=device, requires_grad=True)
    grad, plain = torch.randn_like(x), x.detach()
    scale = torch.tensor([0.02], device=device, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    zero_float = torch.zeros(1, device=device, requires_grad=True)

    def reference() -> object:
        settings = (-128, 127, None, None, False)
        learned_fake_quantization._reference(plain, scale.detach(), zero, *settings)
        return learned_fake_quantization._backward_reference(grad, plain, scale.detach(), zero, *settings)

    def native(t: Tensor, s: Tensor) -> Tensor:
        return learned_fake_quantization.fake_quantize_learned(t, s, zero, -128, 127)

    def torch_op(t: Tensor, s: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(t, s, zero_float, -128, 127, 1.0)

    return {
        "copy_": _copy(x),
        "native": _graph(native, [x, scale], grad),
        "reference": reference,
        "torch": _graph(torch_op, [x, scale], grad),
    }


def learned_clips(device: torch.device) -> Contest:
    """fake_quantize_clipped (ULQ) per tensor, 16x64x56x56 float32, forward and backward (torch has none)."""
    x = torch.randn(16, 64, 56, 56, device=device, requires_grad=True)
    grad, plain = torch.randn_like(x), x.detach()
    clips = [torch.tensor([v], device=device, requires_grad=True) for v in (-2.5, 2.6)]

    def reference() -> object:
        arguments = (plain, *(c.detach() for c in clips), -128, 127, False)
        clipped_fake_quantization._reference(*arguments)
        return clipped_fake_quantization._backward_reference(grad, *arguments)

    def native(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return clipped_fake_quantization.fake_quantize_clipped(t, low, high, -128, 127)[0]

    return {"copy_": _copy(x), "native": _graph(native, [x, *clips], grad), "reference": reference}


def fp8_per_tensor(device: torch.device) -> Contest:
    """fake_quantize_float fp8_e4m3 per tensor, 16x64x56x56 float32, forward and backward (torch: cast and back)."""
    x = torch.randn(16, 64, 56, 56, device=device, requires_grad=True)
    grad, plain = torch.randn_like(x), x.detach()
    scale = torch.tensor([0.005], device=device)

    def reference() -> Tensor:
        _, mask = float_fake_quantization._reference(plain, scale, 3, -6, 448.0, None, False, True)
        return clip_masks._reference(grad, mask, False)

    def torch_cast(t: Tensor) -> Tensor:
        return (t / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(t.dtype) * scale

    return {
        "copy_": _copy(x),
        "native": _graph(lambda t: float_fake_quantization.fake_quantize_float(t, scale, "fp8_e4m3"), [x], grad),
        "reference": reference,
        "torch": _graph(torch_cast, [x], grad),
    }


def smallest_and_largest(device: torch.device) -> Contest:
    """observe_min_max per tensor, 16x64x56x56 float32."""
    x = torch.randn(16, 64, 56, 56, device=device)
    return {
        "copy_": _copy(x),
        "native": lambda: observation.observe_min_max(x),
        "reference": lambda: observation.min_max_reference(x, None, False),
        "torch": lambda: torch.aminmax(x),
    }


def counts_in_bins(device: torch.device) -> Contest:
    """observe_histogram, 2048 bins, 16x64x56x56 float32 after a ReLU (torch: histc and aminmax)."""
    x = torch.randn(16, 64, 56, 56, device=device).relu_()
    low, high = (torch.tensor([end], dtype=torch.float64, device=device) for end in (0.0, 8.0))
    observe = histogram_observation.observe_histogram
    return {
        "copy_": _copy(x),
        "native": lambda: observe(x, low, high, 2048),
        "reference": lambda: histogram_observation._reference(x, low, high, 2048, False),
        "torch": lambda: (torch.histc(x, 2048, 0.0, 8.0), torch.aminmax(x)),
    }


def two_of_four(device: torch.device) -> Contest:
    """nm_mask 2:4 of 4096x4096 float32 (torch: WeightNormSparsifier; topk: scatter of a topk)."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    linear = torch.nn.Linear(4096, 4096, bias=False, device=device)
    weight = linear.weight.detach()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(torch.nn.Sequential(linear), config=[{"tensor_fqn": "0.weight"}])

    def topk() -> Tensor:
        groups = weight.abs().view(-1, 4)
        best = groups.topk(2, dim=1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)

    return {
        "copy_": _copy(weight),
        "native": lambda: nm_masking.nm_mask(weight, 2, 4),
        "reference": lambda: nm_masking._reference(weight, 2, 4, 1, False),
        "torch": sparsifier.step,
        "topk": topk,
    }


def half_of_the_blocks_linear(device: torch.device) -> Contest:
    """block_mask, half of the 32 x 64 blocks of 4096x4096 float32 (torch: WeightNormSparsifier)."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    linear = torch.nn.Linear(4096, 4096, bias=False, device=device)
    weight = linear.weight.detach()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(64, 32), zeros_per_block=64 * 32)
    sparsifier.prepare(torch.nn.Sequential(linear), config=[{"tensor_fqn": "0.weight"}])
    return {
        "copy_": _copy(weight),
        "native": lambda: block_masking.block_mask(weight, 0.5),
        "reference": lambda: block_masking._reference(weight, 4096, 32, 64, True, False),
        "torch": sparsifier.step,
    }


def half_of_the_blocks_conv(device: torch.device) -> Contest:
    """block_mask, half of the 32 x 64 blocks of 512x512x3x3 float32 (topk: pad, view, abs, mean, topk, expand)."""
    weight = torch.randn(512, 512, 3, 3, device=device)

    def topk() -> Tensor:
        padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, -512 % 32, 0, -512 % 64))
        means = padded.view(8, 64, 16, 32, 3, 3).abs().mean(dim=(1, 3))
        best = means.flatten().topk(means.numel() // 2).indices
        kept = torch.zeros(means.numel(), dtype=torch.bool, device=device).scatter_(0, best, True)
        return kept.view(8, 1, 16, 1, 3, 3).expand(8, 64, 16, 32, 3, 3).reshape(padded.shape)[:512, :512]

    return {
        "copy_": _copy(weight),
        "native": lambda: block_masking.block_mask(weight, 0.5),
        "reference": lambda: block_masking._reference(weight, 576, 32, 64, True, False),
        "topk": topk,
    }


CONTESTS = [
    fake_quantize_per_tensor,
    observe_and_fake_quantize,
    weights_per_channel,
    learned_scale,
    learned_clips,
    fp8_per_tensor,
    smallest_and_largest,
    counts_in_bins,
    two_of_four,
    half_of_the_blocks_linear,
    half_of_the_blocks_conv,
]
