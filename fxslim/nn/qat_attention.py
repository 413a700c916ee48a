# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention for quantization-aware training.

The plain layer hands its weights to one function. Here the projections are products of their own, so that each reads
quantized weights and inputs; ``out_proj`` is a ``LinearQAT``.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import ConfigError, UnsupportedLayerError
from fxslim.nn.bias_grids import input_scale, integer_bias
from fxslim.nn.deployed_layers import DeployedLayer, held, keep_from_fusing
from fxslim.nn.int8_linear import deployed_linear
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.masked_attention import MaskedMultiheadAttention
from fxslim.nn.masked_linear import MaskedLinear
from fxslim.nn.qat_linear import LinearQAT
from fxslim.nn.quant_config import QuantConfig
from fxslim.nn.quantized_layers import QuantizedLayer
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.nn.quantizers.gradient_routes import straight_through
from fxslim.nn.quantizers.onnx_lowering import is_lowering, telling
from fxslim.nn.quantizers.real_values import real_twin, without_modes
from fxslim.nn.small_weights import SmallWeight
from fxslim.patterns.weight_layout import WeightLayout


class MultiheadAttentionQAT(QuantizedLayer, MaskedMultiheadAttention):
    """``nn.MultiheadAttention`` with quantized projections; scores and their products with values stay in float.

    Query, key and value have a quantizer each, of which that of the query serves for what is the same tensor.
    """

    float_class, masked_class = nn.MultiheadAttention, MaskedMultiheadAttention
    is_fused_by_torch = True
    input_names = ("input", "key", "value")

    def start_quantizing(self, config: QuantConfig) -> None:
        super().start_quantizing(config)
        if not isinstance(self.out_proj, LinearQAT):
            out_proj: Any = copied_as(self.out_proj, LinearQAT)
            out_proj.start_quantizing(config)
            self.out_proj = out_proj
        # What it gives is what out_proj gives, which quantizes it.
        self.output_quantizer = None

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        return DeployedAttention(self, given)

    def to_float(self) -> nn.Module:
        plain: Any = super().to_float()
        if isinstance(self.out_proj, MaskedLinear):
            plain.out_proj = copied_as(self.out_proj.to_float(), nn.modules.linear.NonDynamicallyQuantizableLinear)
        return plain

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise UnsupportedLayerError(
                f"{type(self).__name__} takes no nested tensors: pad them; in an nn.TransformerEncoder set "
                "use_nested_tensor = False"
            )
        self.check_call(query)
        if is_causal and attn_mask is None:
            raise ConfigError(f"{type(self).__name__}: is_causal=True says what attn_mask is: give that, too")
        batched = query.dim() == 3
        inputs = self._quantized_inputs(query, key, value)
        if not batched:
            inputs = _each(inputs, lambda x: x.unsqueeze(0))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = _each(inputs, lambda x: x.transpose(0, 1))
        q, k, v, extra = self._heads(inputs)
        _check_masks(q, k.shape[2] - extra, attn_mask, key_padding_mask)
        if is_causal and key_padding_mask is None and not need_weights:
            # As the plain layer: the hint stands for the mask, so that added places, the last ones, are not seen.
            dropout = self.dropout if self.training else 0.0
            outputs, weights = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True), None
        else:
            mask = self._mask(q, k, attn_mask, key_padding_mask, extra)
            outputs, weights = self._attended(q, k, v, mask, need_weights)
        outputs = self.out_proj(outputs.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return outputs.squeeze(0), None if weights is None else weights.squeeze(0)
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def _quantized_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        quantizers: list[Any] = [
            self.input_quantizer,
            self._modules.get("key_quantizer"),
            self._modules.get("value_quantizer"),
        ]
        done: list[tuple[Tensor, Tensor]] = []
        for x, quantizer in zip((query, key, value), quantizers, strict=True):
            same = next((shown for other, shown in done if other is x), None)
            given = x if quantizer is None or same is not None else quantizer(x)
            done.append((x, given if quantizer is None or same is None else quantizer.unneeded(x, same)))
        return [shown for _, shown in done]

    def _projected(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        scales: list[Tensor] | None = [] if self.rounds_biases and self.in_proj_bias is not None else None
        weights: Sequence[Tensor] = [self.computed(name, scales) for name in self.maskable]
        bias: Tensor | None = self.in_proj_bias
        if scales and len(scales) == len(weights):
            same = [next(number for number, other in enumerate(inputs) if other is x) for x in inputs]
            bias = projection_bias_in_eval(self, scales, same)
        if len(weights) == 1 and inputs[0] is inputs[1] is inputs[2]:
            return F.linear(inputs[0], weights[0], bias).chunk(3, -1)
        if len(weights) == 1:
            weights = weights[0].chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _heads(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Projections as (batch, heads, places, dims), and how many places were added to keys and values."""
        q, k, v = self._projected(inputs)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
            extra += 1
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        return q, k, v, extra

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, extra: int
    ) -> Tensor | None:
        """What is added to the scores."""
        total = None
        if attn_mask is not None:
            total = F.pad(_as_added(attn_mask, q.dtype), (0, extra))
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads)) if total.shape[0] > 1 else total.unsqueeze(0)
        if key_padding_mask is not None:
            padding = F.pad(_as_added(key_padding_mask, q.dtype), (0, extra))[:, None, None, :]
            total = padding if total is None else total + padding
        return total

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ v, weights


def projection_bias(layer: Any, scales: Sequence[Tensor], same: Sequence[int]) -> Tensor:
    """The bias of all three projections as integer kernels add it.

    ``scales``: of the weights, in one or in three; ``same``: which of query, key and value first is the same tensor.
    """
    split = scales[0].chunk(3) if len(scales) == 1 and scales[0].numel() > 1 else [*scales] * (3 // len(scales))
    found = []
    for bias, scale, number in zip(layer.in_proj_bias.detach().chunk(3), split, same, strict=True):
        found.append(integer_bias(bias, input_scale(layer, layer.input_names[number]), scale))
    return torch.cat(found)


def projection_bias_in_eval(layer: MultiheadAttentionQAT, scales: Sequence[Tensor], same: Sequence[int]) -> Tensor:
    """The same, with the gradient of the bias."""
    if is_lowering():
        with without_modes(), telling():
            return projection_bias(real_twin(layer), scales, same)
    return straight_through(projection_bias(layer, scales, same), layer.in_proj_bias)


class DeployedAttention(nn.Module):
    """``nn.MultiheadAttention`` whose projections are deployed linear layers: in integers where torch has kernels."""

    # What torch's encoder layers ask, before they take their fused path.
    _qkv_same_embed_dim, in_proj_weight, in_proj_bias = False, None, None

    def __init__(self, layer: MultiheadAttentionQAT, given: ActivationQuantizer | None = None) -> None:
        super().__init__()
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(layer, name))
        for name in ("bias_k", "bias_v"):
            value = getattr(layer, name)
            self.register_buffer(name, None if value is None else value.detach().clone())
        weights = [SmallWeight.of(layer, name, WeightLayout()) for name in layer.maskable]
        weights = weights[0].split(3) if len(weights) == 1 else weights
        biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
        for name, weight, bias, source in zip("qkv", weights, biases, layer.input_names, strict=True):
            part = SimpleNamespace(
                in_features=weight.row_shape[1], out_features=weight.row_shape[0], input_dims=None, bias=bias,
                input_quantizer=layer._modules.get(f"{source}_quantizer"), output_quantizer=None,
                is_fused_by_torch=False,
            )  # fmt: skip
            self.add_module(f"{name}_proj", deployed_linear(part, None, given, weight))
        out_proj: Any = layer.out_proj
        self.out_proj = out_proj.deployed(None, None)
        self.output_quantizer = None if layer.output_quantizer is None else held(layer.output_quantizer)
        keep_from_fusing(self)

    input_dims, check_call = None, DeployedLayer.check_input
    forward = MultiheadAttentionQAT.forward
    _heads, _mask, _attended = (getattr(MultiheadAttentionQAT, name) for name in ("_heads", "_mask", "_attended"))

    def _quantized_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projections; the grid of the query serves for what is the same tensor."""
        layers: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        inputs, found = (query, key, value), []
        for x, layer in zip(inputs, layers, strict=True):
            first = next(number for number, other in enumerate(inputs) if other is x)
            found.append(layer.computed(x, layers[first].input_quantizer))
        return found

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs


def _each(inputs: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """All changed; what was one tensor is one."""
    changed = {id(x): change(x) for x in inputs}
    return [changed[id(x)] for x in inputs]


def _check_masks(q: Tensor, num_keys: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
    batch, heads, queries, _ = q.shape
    fitting = {2: (queries, num_keys), 3: (batch * heads, queries, num_keys)}
    if attn_mask is not None and tuple(attn_mask.shape) != fitting.get(attn_mask.dim()):
        raise ConfigError(f"attn_mask is {tuple(attn_mask.shape)}, expected {fitting[2]} or {fitting[3]}")
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, num_keys):
        raise ConfigError(f"key_padding_mask is {tuple(key_padding_mask.shape)}, expected {(batch, num_keys)}")


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a mask of bools is True nothing is seen."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
