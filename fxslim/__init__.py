# SPDX-License-Identifier: Apache-2.0
"""fxslim makes a PyTorch model smaller and faster and keeps it a PyTorch model."""

from fxslim import kernels as kernels
from fxslim import patterns as patterns
from fxslim import schedules as schedules
from fxslim import sparsity as sparsity
from fxslim.checkpoint.model_files import load as load
from fxslim.checkpoint.model_files import read_extras as read_extras
from fxslim.checkpoint.model_files import save as save
from fxslim.checkpoint.plan_files import load_plan as load_plan
from fxslim.checkpoint.shrunk_weights import BlockMap as BlockMap
from fxslim.checkpoint.shrunk_weights import load_shrunk as load_shrunk
from fxslim.errors import CalibrationError as CalibrationError
from fxslim.errors import CheckpointError as CheckpointError
from fxslim.errors import ConfigError as ConfigError
from fxslim.errors import DtypeError as DtypeError
from fxslim.errors import ExportError as ExportError
from fxslim.errors import FxslimError as FxslimError
from fxslim.errors import PlanError as PlanError
from fxslim.errors import TraceError as TraceError
from fxslim.errors import UnsupportedLayerError as UnsupportedLayerError
from fxslim.graph.channel_graph import ChannelGraph as ChannelGraph
from fxslim.graph.channel_graph import trace as trace
from fxslim.graph.cost import Cost as Cost
from fxslim.graph.groups import ChannelGroup as ChannelGroup
from fxslim.graph.inputs import Inputs as Inputs
from fxslim.plan.applied_plans import applied as applied
from fxslim.pruning.iterative import Pruner as Pruner
from fxslim.pruning.planning import plan_pruning as plan_pruning
from fxslim.pruning.planning import prune as prune
from fxslim.pruning.pruning_plan import PruningPlan as PruningPlan
from fxslim.pruning.repair.settings import Repair as Repair
from fxslim.sparsity.planning import plan_sparsity as plan_sparsity
from fxslim.sparsity.planning import sparsify as sparsify
from fxslim.sparsity.sparsity_plan import SparsityPlan as SparsityPlan
from fxslim.version import __version__ as __version__
