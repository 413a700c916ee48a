# SPDX-License-Identifier: Apache-2.0
"""Backward operators that can't be differentiated again say so, by name."""

import torch

from fxslim.errors import UnsupportedLayerError


def register_once_differentiable(op_name: str) -> None:
    """Make a second derivative through ``<op_name>_backward`` an error."""

    def refuse(ctx, *grads):  # type: ignore[no-untyped-def]
        raise UnsupportedLayerError(f"{op_name} has no second derivative (double backward)")

    torch.library.register_autograd(f"fxslim::{op_name}_backward", refuse)
