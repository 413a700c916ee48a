# SPDX-License-Identifier: Apache-2.0
"""Operators with a pure-PyTorch reference each, and native CPU and CUDA kernels where they are built."""

from fxslim.kernels.block_layout import pack_blocks as pack_blocks
from fxslim.kernels.block_masking import block_mask as block_mask
from fxslim.kernels.block_sparse_convolution import block_sparse_conv2d as block_sparse_conv2d
from fxslim.kernels.block_sparse_int8_convolution import block_sparse_conv2d_int8 as block_sparse_conv2d_int8
from fxslim.kernels.clipped_fake_quantization import fake_quantize_clipped as fake_quantize_clipped
from fxslim.kernels.fake_quantization import fake_quantize as fake_quantize
from fxslim.kernels.float_fake_quantization import fake_quantize_float as fake_quantize_float
from fxslim.kernels.histogram_errors import quantization_errors as quantization_errors
from fxslim.kernels.histogram_observation import observe_histogram as observe_histogram
from fxslim.kernels.learned_fake_quantization import fake_quantize_learned as fake_quantize_learned
from fxslim.kernels.native import attach_libraries as _attach_libraries
from fxslim.kernels.native import implementation as implementation
from fxslim.kernels.native import operator_names as operator_names
from fxslim.kernels.nm_masking import nm_mask as nm_mask
from fxslim.kernels.observation import observe_min_max as observe_min_max
from fxslim.kernels.observed_fake_quantization import observe_fake_quantize as observe_fake_quantize

_attach_libraries()
