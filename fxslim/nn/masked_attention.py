# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention with masks: it hands its weights to a function, so the mask is put in by the owner."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import UnsupportedLayerError
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.masked_linear import MaskedLinear
from fxslim.nn.masked_weights import MaskedWeights


class MaskedMultiheadAttention(MaskedWeights, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose input projections count where their masks are True.

    ``in_proj_weight`` has the mask ``in_proj_weight_mask`` (``q_proj_weight_mask`` and so on where they are apart);
    ``out_proj`` may be a ``MaskedLinear`` of its own. Nested tensors, which only torch's fused path takes, are refused.
    """

    float_class = nn.MultiheadAttention

    @property
    def maskable(self) -> tuple[str, ...]:
        """The input projections."""
        if self.in_proj_weight is not None:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def to_float(self) -> nn.Module:
        """The plain layer, with zeros in its weights, those of ``out_proj`` included."""
        plain: Any = super().to_float()
        if isinstance(self.out_proj, MaskedLinear):
            plain.out_proj = copied_as(self.out_proj.to_float(), nn.modules.linear.NonDynamicallyQuantizableLinear)
        return plain

    def forward(
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
        if isinstance(self.out_proj, MaskedLinear):
            # It is not called itself.
            self.out_proj.before_batch()
        batch_first = self.batch_first and query.dim() == 3
        if batch_first:
            query, key, value = _transposed(query, key, value)
        weights: dict[str, Any] = {name: self.masked(name) for name in self.maskable}
        out_proj = self.out_proj
        outputs, attention = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads,
            weights.pop("in_proj_weight", None), self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn,
            self.dropout, out_proj.masked() if isinstance(out_proj, MaskedLinear) else out_proj.weight, out_proj.bias,
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights,
            attn_mask=attn_mask, use_separate_proj_weight=bool(weights), average_attn_weights=average_attn_weights,
            is_causal=is_causal, **weights,
        )  # fmt: skip
        return (outputs.transpose(1, 0) if batch_first else outputs), attention


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence first; inputs that are one tensor stay one, which the function looks at."""
    done = {id(x): x.transpose(1, 0) for x in (query, key, value)}
    return done[id(query)], done[id(key)], done[id(value)]
