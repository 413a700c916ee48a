# SPDX-License-Identifier: Apache-2.0
"""Out of training: a quantized model as plain layers with small weights, in integers where torch has kernels."""

from fxslim.deploy.convert_plan import ConvertPlan as ConvertPlan
from fxslim.deploy.converting import convert as convert
from fxslim.deploy.converting import plan_convert as plan_convert
