// Smallest and largest values. NaN in the data makes the range NaN.
#pragma once

#include "channel_reduction.h"
#include "quantize.h"

namespace fxslim {

enum RangeQuantity { kLow = 0, kHigh = 1, kBad = 2 };

template <class M>
FXSLIM_INLINE inline void extend(const M* __restrict x, int64_t n, M& low_, M& high_, M& bad_) {
  M low = low_, high = high_;
  int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    bad |= x[i] != x[i];
  }
  low_ = low;
  high_ = high;
  if (bad) bad_ = 1;
}

template <class M>
FXSLIM_INLINE inline void extend_each(
    const M* __restrict x, int64_t n, M* __restrict low, M* __restrict high, M* __restrict bad) {
  for (int64_t i = 0; i < n; ++i) {
    low[i] = x[i] < low[i] ? x[i] : low[i];
    high[i] = x[i] > high[i] ? x[i] : high[i];
    bad[i] = x[i] != x[i] ? M(1) : bad[i];
  }
}

// Extends the range by elements [begin, end), all of one channel.
template <class T>
void extend_by_run(const T* x, int64_t begin, int64_t end, math_t<T>* acc) {
  using M = math_t<T>;
  alignas(64) M buffer[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const M* values = load_block(x + i, buffer, n);
    for_best_cpu([&]() FXSLIM_INLINE { extend(values, n, acc[kLow], acc[kHigh], acc[kBad]); });
  }
}

template <class T>
void extend_table(const T* x, int64_t begin, int64_t end, math_t<T>* acc, int64_t table) {
  using M = math_t<T>;
  alignas(64) M buffer[kBlock];
  for (int64_t i = begin; i < end;) {
    const int64_t at = (i - begin) % table;
    const int64_t n = std::min({kBlock, end - i, table - at});
    const M* values = load_block(x + i, buffer, n);
    for_best_cpu([&]() FXSLIM_INLINE {
      extend_each(values, n, acc + at, acc + table + at, acc + 2 * table + at);
    });
    i += n;
  }
}

template <class M>
Range<M> range_of(const M* acc, int64_t stride) {
  constexpr M nan = std::numeric_limits<M>::quiet_NaN();
  if (acc[kBad * stride] != 0) return {nan, nan};
  // Adding 0 turns -0.0, which may come before or after 0.0, into 0.0.
  return {acc[kLow * stride] + M(0), acc[kHigh * stride] + M(0)};
}

template <class M>
constexpr M range_start(int64_t quantity) {
  return quantity == kLow ? std::numeric_limits<M>::infinity()
                          : quantity == kHigh ? -std::numeric_limits<M>::infinity() : M(0);
}

template <class T>
std::vector<Range<math_t<T>>> channel_ranges(const T* x, const Walk& walk) {
  using M = math_t<T>;
  const std::vector<M> acc = reduce_channels<3, M>(
      walk, range_start<M>,
      [&](int64_t begin, int64_t end, int64_t, M* run) { extend_by_run(x, begin, end, run); },
      [&](int64_t begin, int64_t end, M* all, int64_t table) { extend_table(x, begin, end, all, table); },
      [](M* into, int64_t a, const M* from, int64_t b) {
        into[kLow * a] = std::min(into[kLow * a], from[kLow * b]);
        into[kHigh * a] = std::max(into[kHigh * a], from[kHigh * b]);
        into[kBad * a] = std::max(into[kBad * a], from[kBad * b]);
      });
  std::vector<Range<M>> ranges(walk.channels);
  for (int64_t c = 0; c < walk.channels; ++c) ranges[c] = range_of(&acc[c], walk.channels);
  return ranges;
}

}  // namespace fxslim
