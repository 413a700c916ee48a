# SPDX-License-Identifier: Apache-2.0
"""Attributes of linear and bilinear layers and of embeddings."""

from typing import Any

from torch import Tensor, nn

from fxslim.graph.surgery.attributes import family


@family(nn.Linear)
def linear_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Features from the weight."""
    out_features, in_features = tensors["weight"].shape
    return {"in_features": in_features, "out_features": out_features}


@family(nn.Bilinear)
def bilinear_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Features from the weight."""
    made, first, second = tensors["weight"].shape
    return {"in1_features": first, "in2_features": second, "out_features": made}


@family(nn.Embedding, nn.EmbeddingBag)
def embedding_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Columns from the weight."""
    return {"embedding_dim": tensors["weight"].shape[1]}
