# SPDX-License-Identifier: Apache-2.0
"""Importance: a number per channel of a group; the lowest go first. By name, or as instances of these classes."""

from fxslim.pruning.importance.activations import APoZ as APoZ
from fxslim.pruning.importance.activations import MeanActivation as MeanActivation
from fxslim.pruning.importance.criterion import Context as Context
from fxslim.pruning.importance.criterion import Importance as Importance
from fxslim.pruning.importance.filter_weights import ConvAll as ConvAll
from fxslim.pruning.importance.filter_weights import ConvAvg as ConvAvg
from fxslim.pruning.importance.filter_weights import ConvMax as ConvMax
from fxslim.pruning.importance.filter_weights import ConvThreshold as ConvThreshold
from fxslim.pruning.importance.filter_weights import Dnn as Dnn
from fxslim.pruning.importance.fisher import Fisher as Fisher
from fxslim.pruning.importance.geometric_median import FPGM as FPGM
from fxslim.pruning.importance.magnitude import L1 as L1
from fxslim.pruning.importance.magnitude import L2 as L2
from fxslim.pruning.importance.magnitude import BalancedL2 as BalancedL2
from fxslim.pruning.importance.magnitude import LInf as LInf
from fxslim.pruning.importance.names import CRITERIA as CRITERIA
from fxslim.pruning.importance.names import channel_scores as channel_scores
from fxslim.pruning.importance.norm_weights import BatchNormWeight as BatchNormWeight
from fxslim.pruning.importance.random_order import Random as Random
from fxslim.pruning.importance.reconstruction import Reconstruction as Reconstruction
from fxslim.pruning.importance.similarity import BatchNormSimilarity as BatchNormSimilarity
from fxslim.pruning.importance.similarity import ConvSimilarity as ConvSimilarity
from fxslim.pruning.importance.taylor import Taylor as Taylor
