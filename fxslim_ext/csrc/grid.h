// Ranges and integer grids: the scalar arithmetic that CPU and CUDA kernels share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define FXSLIM_BOTH __host__ __device__ inline
#else
#define FXSLIM_BOTH inline
#endif

namespace fxslim {

template <class M>
struct Range {
  M low = std::numeric_limits<M>::infinity(), high = -std::numeric_limits<M>::infinity();
};

template <class M>
struct Grid {
  M scale;
  int32_t zero_point;
};

// A scale that can't be used turns its outputs into NaN: visible, and the same on every device.
template <class M>
FXSLIM_BOTH M usable_scale(M scale) {
  return scale > 0 && scale <= std::numeric_limits<M>::max() ? scale : std::numeric_limits<M>::quiet_NaN();
}

template <class M>
FXSLIM_BOTH M smaller(M a, M b) {
  return a != a || b != b ? std::numeric_limits<M>::quiet_NaN() : b < a ? b : a;
}

// How an observed range changes the running one.
struct Averaging {
  bool extrema;
  double factor;

  template <class M>
  FXSLIM_BOTH M average(M old, M now) const {
    const M infinity = std::numeric_limits<M>::infinity();
    if (factor == 1.0 || old == infinity || old == -infinity) return now;
    return old + (now - old) * static_cast<M>(factor);
  }

  template <class M>
  FXSLIM_BOTH Range<M> update(const Range<M>& old, const Range<M>& now) const {
    // Adding 0 turns -0.0 into 0.0.
    if (extrema) return {smaller(old.low, now.low) + M(0), -smaller(-old.high, -now.high) + M(0)};
    return {average(old.low, now.low), average(old.high, now.high)};
  }
};

FXSLIM_BOTH int32_t to_zero_point(double value, int64_t if_nan, int64_t quant_min, int64_t quant_max) {
  if (value != value) value = static_cast<double>(if_nan);
  if (value < static_cast<double>(quant_min)) value = static_cast<double>(quant_min);
  if (value > static_cast<double>(quant_max)) value = static_cast<double>(quant_max);
  return static_cast<int32_t>(value);
}

// Scale and zero point that cover a range widened to hold 0; see grid_from_range in Python.
template <class M>
FXSLIM_BOTH Grid<M> grid_from_range(const Range<M>& range, int64_t quant_min, int64_t quant_max, bool symmetric) {
  const M low = range.low > 0 ? M(0) : range.low, high = range.high < 0 ? M(0) : range.high;
  const int64_t at_zero = quant_min <= 0 && 0 <= quant_max ? 0 : quant_min;
  M scale;
  double zero_point;
  if (symmetric) {
    const int64_t middle = quant_min < 0 ? 0 : (quant_min + quant_max + 1) / 2;
    const M up = high / static_cast<M>(quant_max - middle), down = low / static_cast<M>(quant_min - middle);
    scale = -smaller(-up, -down);
    zero_point = static_cast<double>(middle);
  } else {
    scale = (high - low) / static_cast<M>(quant_max - quant_min);
    zero_point = static_cast<double>(static_cast<M>(quant_min) - std::nearbyint(low / scale));
  }
  if (scale < std::numeric_limits<M>::min()) {
    if (!symmetric) zero_point = static_cast<double>(at_zero);
    scale = M(1);
  }
  return {usable_scale(scale), to_zero_point(zero_point, at_zero, quant_min, quant_max)};
}

// The grid between two clips.
template <class M>
FXSLIM_BOTH Grid<M> grid_between(M clip_min, M clip_max, int64_t quant_min, int64_t quant_max) {
  const M scale = usable_scale((clip_max - clip_min) / static_cast<M>(quant_max - quant_min));
  const M zero_point = static_cast<M>(quant_min) - std::nearbyint(clip_min / scale);
  return {scale, to_zero_point(zero_point, quant_min, quant_min, quant_max)};
}

// What a learned scale's gradient is multiplied by where no factor is given: 1 / sqrt(elements * quant_max).
inline double learning_factor(int64_t elements_per_scale, int64_t quant_max) {
  const double elements = elements_per_scale > 1 ? static_cast<double>(elements_per_scale) : 1.0;
  const double steps = quant_max < 0 ? -quant_max : quant_max;
  return 1.0 / std::sqrt(elements * (steps > 1 ? steps : 1.0));
}

}  // namespace fxslim
