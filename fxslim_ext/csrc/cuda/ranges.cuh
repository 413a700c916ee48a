// Smallest and largest values over blocks. NaN in the data makes the range NaN.
#pragma once

#include "kernels.cuh"

namespace fxslim {

// A range and whether a NaN was seen.
template <class M>
struct Seen {
  Range<M> range;
  bool bad = false;
};

template <class M>
struct Unite {
  __device__ Seen<M> operator()(const Seen<M>& a, const Seen<M>& b) const {
    Seen<M> both;
    both.range.low = b.range.low < a.range.low ? b.range.low : a.range.low;
    both.range.high = b.range.high > a.range.high ? b.range.high : a.range.high;
    both.bad = a.bad || b.bad;
    return both;
  }
};

// Three values of a block: low, high, and 1 where a NaN was seen.
template <class M>
__device__ void store_partial_range(const Seen<M>& seen, M* mine) {
  mine[0] = seen.range.low;
  mine[1] = seen.range.high;
  mine[2] = seen.bad ? M(1) : M(0);
}

template <class M>
__device__ Seen<M> seen_with(Seen<M> seen, M value) {
  seen.range.low = value < seen.range.low ? value : seen.range.low;
  seen.range.high = value > seen.range.high ? value : seen.range.high;
  seen.bad |= value != value;
  return seen;
}

template <class M>
__device__ Range<M> channel_range(const M* partial, int64_t count) {
  Seen<M> seen;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    const M* one = partial + 3 * (blockIdx.x * count + k);
    seen = Unite<M>{}(seen, Seen<M>{{one[0], one[1]}, one[2] != 0});
  }
  seen = combine_block(seen, Unite<M>{});
  const M nan = std::numeric_limits<M>::quiet_NaN();
  return seen.bad ? Range<M>{nan, nan} : Range<M>{seen.range.low + M(0), seen.range.high + M(0)};
}

template <class M>
__global__ void finish_range_kernel(const M* partial, int64_t count, M* low, M* high) {
  const Range<M> range = channel_range(partial, count);
  if (threadIdx.x != 0) return;
  low[blockIdx.x] = range.low;
  high[blockIdx.x] = range.high;
}

}  // namespace fxslim
