# SPDX-License-Identifier: Apache-2.0
"""How many rows and columns a convolution adds around its input."""

from typing import Any


def image_paddings(layer: Any) -> tuple[list[int], list[int]]:
    """Above and left of the image, and below and right of it.

    >>> from torch import nn
    >>> image_paddings(nn.Conv2d(1, 1, (2, 3), padding="same"))
    ([0, 1], [1, 1])
    """
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    both = [0, 0] if layer.padding == "valid" else list(layer.padding)
    return both, both
