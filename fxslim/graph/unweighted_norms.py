# SPDX-License-Identifier: Apache-2.0
"""Norms without parameters: the attribute with their size stands in for the weight that they do not have."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_SIZES: tuple[tuple[type, str], ...] = (
    (nn.LayerNorm, "normalized_shape"),
    (nn.RMSNorm, "normalized_shape"),
    (nn.GroupNorm, "num_channels"),
    (_NormBase, "num_features"),
)


def size_attribute(module: nn.Module | None) -> str:
    """The name of the attribute, or nothing for a norm with parameters and for other modules.

    >>> size_attribute(nn.GroupNorm(2, 8, affine=False)), size_attribute(nn.GroupNorm(2, 8))
    ('num_channels', '')
    """
    if module is None or next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return ""
    return next((attribute for kind, attribute in _SIZES if isinstance(module, kind)), "")


def find_unweighted_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name of the stand-in, module and attribute of each norm without parameters.

    >>> [name for name, _, _ in find_unweighted_norms(nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)))]
    ['0.normalized_shape']
    """
    for name, module in model.named_modules():
        attribute = size_attribute(module)
        if attribute:
            yield f"{name}.{attribute}".lstrip("."), module, attribute
