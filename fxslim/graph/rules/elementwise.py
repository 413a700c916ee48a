# SPDX-License-Identifier: Apache-2.0
"""Operators that work on each element by itself."""

import math

from torch import fx

from fxslim.graph.labels import Labels
from fxslim.graph.propagation import Propagation, combined, results_without_channels, rule
from fxslim.graph.rules.sizes import repeated

UNARY = """
relu relu6 gelu sigmoid hardsigmoid tanh silu hardswish hardtanh leaky_relu elu celu selu mish softplus softsign
threshold logsigmoid abs neg exp log sqrt rsqrt sin cos square reciprocal sign floor ceil round clamp clamp_min
clamp_max clone contiguous detach alias lift_fresh _to_copy to dropout native_dropout feature_dropout bernoulli
zeros_like ones_like empty_like full_like rand_like randn_like nan_to_num logical_not bitwise_not fill zero erf
log1p expm1 isnan trunc positive
""".split()

COMBINING = """
add sub mul div rsub maximum minimum pow where lerp addcmul addcdiv eq ne lt le gt ge logical_and logical_or
logical_xor fmod remainder copy atan2 masked_fill floor_divide true_divide
""".split()

FACTORIES = """
empty zeros ones full arange linspace scalar_tensor rand randn new_empty new_zeros new_ones new_full eye
""".split()


@rule(*UNARY, elementwise=True)
def follow(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """The labels of the first argument."""
    labels = propagation.labels(node.args[0])
    if len(node.all_input_nodes) > 1 and node.meta["shape"] is not None and "_like" not in str(node.target):
        return combine(propagation, node)
    if labels is None:
        return results_without_channels(node)
    if node.meta["shape"] is None:
        return [labels, labels]
    return labels


@rule(*COMBINING, elementwise=True)
def combine(propagation: Propagation, node: fx.Node) -> Labels:
    """Labels of the operands, unified."""
    # The largest first, parameters last: where channels along different dims meet, the first ones stay free.
    values = sorted((*node.args, *node.kwargs.values()), key=lambda value: propagation.state_name(value) is not None)
    operands = [labels for value in values if (labels := propagation.labels(value)) is not None]
    operands.sort(key=lambda labels: -math.prod(labels.shape))
    return combined(propagation, node, operands, node.meta["shape"])


@rule(*FACTORIES)
def create(propagation: Propagation, node: fx.Node) -> Labels:
    """A new tensor has no channels, but along a dim whose size was read from channels it shrinks with them.

    One value for all entries can follow an attribute too, such as the number of heads.
    """
    return repeated(propagation, node, range(len(node.meta["shape"])))
