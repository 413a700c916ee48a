// Which of equal-width bins a value lies in: the arithmetic that CPU and CUDA kernels share.
#pragma once

#include "grid.h"

namespace fxslim {

// Positions are counted from the point of the range nearest 0: exact where bins start at multiples of
// a power of two, however small a value is beside the range.
template <class M>
struct Bins {
  M anchor, rate, fraction, whole, last;
  bool usable;

  FXSLIM_BOTH Bins(double low, double high, int64_t count) {
    rate = static_cast<M>(static_cast<double>(count) / (high - low));
    const double nearest = low > 0 ? low : high < 0 ? high : 0.0;
    const double start = (low - nearest) * static_cast<double>(rate);
    const double whole_ = std::floor(start);
    anchor = static_cast<M>(nearest);
    fraction = static_cast<M>(start - whole_);
    whole = static_cast<M>(whole_);
    last = static_cast<M>(count - 1);
    const M most = std::numeric_limits<M>::max();
    const bool finite = low - low == 0 && high - high == 0 && anchor >= -most && anchor <= most;
    usable = low < high && finite && rate > 0 && rate <= most;
  }

  // `count` for NaN.
  FXSLIM_BOTH int32_t operator()(M x) const {
    M position = std::floor((x - anchor) * rate - fraction) - whole;
    position = position > 0 ? position : M(0);
    position = position < last ? position : last;
    return static_cast<int32_t>(x != x ? last + M(1) : position);
  }
};

}  // namespace fxslim
