# SPDX-License-Identifier: Apache-2.0
"""How a quantizer's range is chosen from what was observed."""

from fxslim.ranges.histogram import Histogram as Histogram
from fxslim.ranges.method import RangeMethod as RangeMethod
from fxslim.ranges.names import range_method as range_method
