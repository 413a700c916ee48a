// How a weight (out, in, *kernel) is cut into blocks of cout filters x cin input channels.
#pragma once

#include <algorithm>

#include "layout.h"

namespace fxslim {

// A row holds what a filter has at every (channel, position), or (position, channel) in channels-last order.
struct Blocks {
  int64_t filters, channels, positions, cout, cin;
  bool per_position, channels_last;

  Blocks(const Tensor& weight, int64_t cin_, int64_t cout_, bool per_position_, bool channels_last_)
      : positions(1), per_position(per_position_), channels_last(channels_last_) {
    STD_TORCH_CHECK(weight.dim() >= 2, "blocks need a weight of 2 or more dims, got ", weight.dim());
    STD_TORCH_CHECK(cin_ >= 1 && cout_ >= 1, "cin=", cin_, ", cout=", cout_, " must be at least 1");
    filters = weight.size(0);
    channels = weight.size(1);
    for (int64_t d = 2; d < weight.dim(); ++d) positions *= weight.size(d);
    cout = std::min(cout_, std::max<int64_t>(filters, 1));
    cin = std::min(cin_, std::max<int64_t>(channels, 1));
  }

  int64_t row() const { return channels * positions; }
  int64_t over_filters() const { return (filters + cout - 1) / cout; }
  int64_t over_channels() const { return (channels + cin - 1) / cin; }
  // Sums are made per position; over the whole kernel they are then added up.
  int64_t num_sums() const { return over_filters() * over_channels() * positions; }
  int64_t count() const { return per_position ? num_sums() : over_filters() * over_channels(); }

  void check_removed(int64_t num_removed) const {
    STD_TORCH_CHECK(
        0 <= num_removed && num_removed <= count(), "num_removed=", num_removed, " of ", count(), " blocks");
  }
};

}  // namespace fxslim
