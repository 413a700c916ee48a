# SPDX-License-Identifier: Apache-2.0
"""Ways of choosing which weights stay, one file per idea."""

from fxslim.sparsity.methods.activation_scored import Par as Par
from fxslim.sparsity.methods.activation_scored import Wanda as Wanda
from fxslim.sparsity.methods.first_order import FirstOrder as FirstOrder
from fxslim.sparsity.methods.hessian import Hessian as Hessian
from fxslim.sparsity.methods.magnitude import Magnitude as Magnitude
from fxslim.sparsity.methods.method import Method as Method
from fxslim.sparsity.methods.names import as_method as as_method
from fxslim.sparsity.methods.names import method_from_dict as method_from_dict
