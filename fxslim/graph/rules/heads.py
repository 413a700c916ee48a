# SPDX-License-Identifier: Apache-2.0
"""Where the heads of attention are made."""

import operator

from torch import fx

from fxslim.graph.propagation import operator_name

# What lies between the view that makes heads and the product of queries and keys.
BETWEEN = frozenset(
    """
    permute transpose unbind getitem select slice squeeze unsqueeze clone contiguous expand mul div add neg cat
    _unsafe_view view reshape split split_with_sizes native_layer_norm rms_norm alias detach linalg_vector_norm
    clamp_min repeat_interleave index_select _to_copy copy stack flatten where _softmax
    """.split()
)


def feeds_attention(node: fx.Node) -> bool:
    """Whether a product of two activations comes soon after a view."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < 100:
        for user in waiting.pop().users:
            name = "getitem" if user.target is operator.getitem else operator_name(user)
            if name in ("bmm", "baddbmm"):
                return True
            if name in BETWEEN and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
