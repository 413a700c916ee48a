// observe_histogram on CUDA: a block counts in shared memory where the bins fit there.
#include <algorithm>

#include "../bins.h"
#include "ranges.cuh"

namespace fxslim {
namespace {

// What a block may have without asking for more: 48 KiB, less what combine_block needs.
constexpr int64_t kMostShared = 40 * 1024;

using Count = unsigned long long;

template <class T>
__global__ void histogram_kernel(
    const T* x, int64_t numel, const double* low, const double* high, int num_bins, bool in_shared, Count* counts,
    math_t<T>* partial) {
  using M = math_t<T>;
  extern __shared__ unsigned mine[];
  const Bins<M> bins(*low, *high, num_bins);
  if (in_shared) {
    for (int k = threadIdx.x; k < num_bins; k += kThreads) mine[k] = 0;
    __syncthreads();
  }
  Seen<M> seen;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += step) {
    const M value = static_cast<M>(x[i]);
    seen = seen_with(seen, value);
    const int index = bins(value);
    if (!bins.usable || index == num_bins) continue;
    if (in_shared) atomicAdd(&mine[index], 1u);
    else atomicAdd(&counts[index], Count(1));
  }
  seen = combine_block(seen, Unite<M>{});
  if (threadIdx.x == 0) store_partial_range(seen, partial + 3 * static_cast<int64_t>(blockIdx.x));
  if (!in_shared) return;
  __syncthreads();
  for (int k = threadIdx.x; k < num_bins; k += kThreads)
    if (mine[k] != 0) atomicAdd(&counts[k], Count(mine[k]));
}

std::tuple<Tensor, Tensor, Tensor> observe_histogram(
    const Tensor& x, const Tensor& low, const Tensor& high, int64_t num_bins, bool channels_last) {
  STD_TORCH_CHECK(x.numel() > 0, "x is empty: there is no smallest value");
  STD_TORCH_CHECK(1 <= num_bins && num_bins <= 65536, "bins=", num_bins, " must be in [1, 65536]");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_parameters("low", low, x, 1, ScalarType::Double);
  check_parameters("high", high, x, 1, ScalarType::Double);
  const Tensor input = in_order(x, channels_last);
  Tensor counts = empty_vector(x, num_bins, ScalarType::Long);
  torch::stable::zero_(counts);
  Tensor smallest = empty_scalar(x, math_type(x)), largest = empty_scalar(x, math_type(x));
  const int64_t shared_bytes = num_bins * static_cast<int64_t>(sizeof(unsigned));
  const bool in_shared = shared_bytes <= kMostShared;
  // At least a bin's worth of elements for each thread, so that adding the blocks' counts up costs little;
  // and few enough that no 32-bit count of a block overflows.
  const int64_t wanted = (x.numel() + 8 * (num_bins + kThreads) - 1) / (8 * (num_bins + kThreads));
  const int64_t most = in_shared ? 2048 : 1 << 16;
  const int64_t least = (x.numel() >> 31) + 1;
  const int64_t blocks = std::max(least, std::min(wanted, most));
  Tensor partial = empty_vector(x, 3 * blocks, math_type(x));
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    histogram_kernel<T>
        <<<static_cast<unsigned>(blocks), kThreads, in_shared ? shared_bytes : 0, current_stream(x)>>>(
            data<T>(input), x.numel(), data<double>(low), data<double>(high), static_cast<int>(num_bins), in_shared,
            reinterpret_cast<Count*>(output<int64_t>(counts)), output<M>(partial));
    check_launch();
    finish_range_kernel<M><<<1, kThreads, 0, current_stream(x)>>>(
        data<M>(partial), blocks, output<M>(smallest), output<M>(largest));
    check_launch();
  });
  return {counts, smallest, largest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) { m.impl("observe_histogram", TORCH_BOX(&observe_histogram)); }

}  // namespace fxslim
