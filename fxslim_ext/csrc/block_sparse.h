// A convolution whose weight is stored without its zero blocks; inputs are (batch, height, width, channels).
#pragma once

#include <algorithm>

#include "layout.h"

namespace fxslim {

// Filters whose weights lie beside each other, and channels of one filter that do where weights are bytes.
constexpr int64_t kPanel = 16, kQuad = 4;

struct BlockConvolution {
  int64_t batch, height, width, channels;
  int64_t num_out, cout, cin, panels, over_filters, over_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w;
  int64_t out_h, out_w;

  BlockConvolution(
      const Tensor& input, int64_t num_out_, int64_t cout_, int64_t cin_, const std::vector<int64_t>& kernel,
      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation)
      : num_out(num_out_) {
    STD_TORCH_CHECK(input.dim() == 4, "the input has ", input.dim(), " dims, not 4");
    STD_TORCH_CHECK(
        kernel.size() == 2 && stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
        "kernel_size, stride and dilation are 2 numbers, padding 4");
    batch = input.size(0), height = input.size(1), width = input.size(2), channels = input.size(3);
    STD_TORCH_CHECK(
        num_out >= 1 && cout_ >= 1 && cin_ >= 1 && channels >= 1, "num_out, cout, cin and channels must be at least 1");
    cout = std::min(cout_, num_out);
    cin = std::min(cin_, channels);
    panels = (cout + kPanel - 1) / kPanel;
    over_filters = (num_out + cout - 1) / cout;
    over_channels = (channels + cin - 1) / cin;
    kernel_h = kernel[0], kernel_w = kernel[1], stride_h = stride[0], stride_w = stride[1];
    top = padding[0], left = padding[1], dilation_h = dilation[0], dilation_w = dilation[1];
    STD_TORCH_CHECK(
        std::min({kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w}) >= 1 &&
            std::min({top, left, padding[2], padding[3]}) >= 0,
        "kernel_size, stride and dilation must be at least 1, padding at least 0");
    out_h = (height + top + padding[2] - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
    out_w = (width + left + padding[3] - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
    STD_TORCH_CHECK(
        height + top + padding[2] >= dilation_h * (kernel_h - 1) + 1 &&
            width + left + padding[3] >= dilation_w * (kernel_w - 1) + 1,
        "the padded input is smaller than the kernel");
  }

  int64_t positions() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return batch * out_h * out_w; }

  Tensor empty_output(const Tensor& input) const {
    return torch::stable::new_empty(input, {batch, out_h, out_w, num_out}, input.scalar_type());
  }
};

// What kernels read of a packed weight; on the CPU every number in it is looked at.
struct PackedBlocks {
  Tensor blocks, places, starts;

  PackedBlocks(
      const Tensor& input, const BlockConvolution& conv, const Tensor& blocks_, const Tensor& places_,
      const Tensor& starts_, ScalarType dtype, int64_t block_size)
      : blocks(torch::stable::contiguous(blocks_)),
        places(torch::stable::contiguous(places_)),
        starts(torch::stable::contiguous(starts_)) {
    check_parameters("blocks", blocks, input, places_.numel() / 2 * block_size, dtype);
    check_parameters("places", places, input, blocks_.size(0) * 2, ScalarType::Int);
    check_parameters("starts", starts, input, conv.over_filters + 1, ScalarType::Int);
  }

  // Wrong places would be read from outside of the input.
  void check_places(const BlockConvolution& conv) const {
    const auto* place = static_cast<const int32_t*>(places.const_data_ptr());
    const auto* start = static_cast<const int32_t*>(starts.const_data_ptr());
    const int64_t count = places.numel() / 2;
    bool right = start[0] == 0 && start[conv.over_filters] == count;
    for (int64_t g = 0; g < conv.over_filters; ++g) right &= start[g] <= start[g + 1];
    for (int64_t b = 0; b < count; ++b)
      right &= place[2 * b] >= 0 && place[2 * b] < conv.over_channels && place[2 * b + 1] >= 0 &&
               place[2 * b + 1] < conv.positions();
    STD_TORCH_CHECK(right, "places or starts name blocks that the weight does not have");
  }
};

}  // namespace fxslim
