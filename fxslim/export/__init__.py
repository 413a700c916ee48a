# SPDX-License-Identifier: Apache-2.0
"""Files for runtimes."""

from fxslim.export.qat_conversion import convert_qat_model as convert_qat_model
