# SPDX-License-Identifier: Apache-2.0
"""Out of training: small weights in integers where there are kernels, and layers that skip blocks of zeros."""

from fxslim.deploy.convert_plan import ConvertPlan as ConvertPlan
from fxslim.deploy.converting import convert as convert
from fxslim.deploy.converting import plan_convert as plan_convert
