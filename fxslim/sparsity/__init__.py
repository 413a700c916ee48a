# SPDX-License-Identifier: Apache-2.0
"""Sparsity that is kept: a pattern, a method that chooses the mask, and layers that honour it."""

from fxslim.sparsity.baking import bake as bake
from fxslim.sparsity.masked_training import step_masks as step_masks
from fxslim.sparsity.methods import FirstOrder as FirstOrder
from fxslim.sparsity.methods import Hessian as Hessian
from fxslim.sparsity.methods import Magnitude as Magnitude
from fxslim.sparsity.methods import Par as Par
from fxslim.sparsity.methods import Wanda as Wanda
