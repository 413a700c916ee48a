# SPDX-License-Identifier: Apache-2.0
"""The rules of operators, a file for each kind; importing this package registers them all."""

from fxslim.graph.rules import attention as attention
from fxslim.graph.rules import channel_blocks as channel_blocks
from fxslim.graph.rules import convolution as convolution
from fxslim.graph.rules import elementwise as elementwise
from fxslim.graph.rules import embedding as embedding
from fxslim.graph.rules import indexing as indexing
from fxslim.graph.rules import linear as linear
from fxslim.graph.rules import movement as movement
from fxslim.graph.rules import normalization as normalization
from fxslim.graph.rules import parts as parts
from fxslim.graph.rules import pixels as pixels
from fxslim.graph.rules import products as products
from fxslim.graph.rules import recurrent as recurrent
from fxslim.graph.rules import reshaping as reshaping
from fxslim.graph.rules import selection as selection
