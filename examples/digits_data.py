# SPDX-License-Identifier: Apache-2.0
"""Real handwritten digits that ship inside scikit-learn: 1,797 images, upsampled to 32x32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def load_digits(seed: int = 0, train_fraction: float = 0.75) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffled (train images, train labels, test images, test labels); images are (N, 1, 32, 32), mean 0."""
    from sklearn.datasets import load_digits as read_digits

    digits = read_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = int(len(labels) * train_fraction)
    train, test = order[:count], order[count:]
    return images[train], labels[train], images[test], labels[test]
