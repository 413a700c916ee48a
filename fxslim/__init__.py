# SPDX-License-Identifier: Apache-2.0
"""fxslim makes a PyTorch model smaller and faster and keeps it a PyTorch model."""

from fxslim import kernels as kernels
from fxslim import schedules as schedules
from fxslim.errors import CalibrationError as CalibrationError
from fxslim.errors import CheckpointError as CheckpointError
from fxslim.errors import ConfigError as ConfigError
from fxslim.errors import DtypeError as DtypeError
from fxslim.errors import ExportError as ExportError
from fxslim.errors import FxslimError as FxslimError
from fxslim.errors import PlanError as PlanError
from fxslim.errors import TraceError as TraceError
from fxslim.errors import UnsupportedLayerError as UnsupportedLayerError
from fxslim.version import __version__ as __version__
