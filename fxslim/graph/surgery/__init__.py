# SPDX-License-Identifier: Apache-2.0
"""The only code that edits modules: tensors are cut, attributes follow, an error undoes everything."""

from fxslim.graph.surgery import convolution as convolution
from fxslim.graph.surgery import linear as linear
from fxslim.graph.surgery import normalization as normalization
from fxslim.graph.surgery import recurrent as recurrent
