// observe_min_max and observe_fake_quantize on CUDA.
#include "ranges.cuh"

namespace fxslim {
namespace {

// Three values for each slice of each channel: low, high, and 1 where a NaN was seen.
template <class T>
__global__ void range_kernel(const T* x, Slices slices, math_t<T>* partial) {
  using M = math_t<T>;
  Seen<M> seen;
  for (int64_t k = slices.begin() + threadIdx.x; k < slices.end(); k += kThreads) {
    seen = seen_with(seen, static_cast<M>(x[slices.element(k)]));
  }
  seen = combine_block(seen, Unite<M>{});
  if (threadIdx.x == 0) store_partial_range(seen, partial + 3 * slices.partial());
}

// low and high hold the old range and get the new one; without partial ranges the old one stays.
template <class M>
__global__ void settle_kernel(
    const M* partial, int64_t count, M* low, M* high, M* scale, int32_t* zero_point, Averaging averaging,
    int64_t quant_min, int64_t quant_max, bool symmetric) {
  const int64_t c = blockIdx.x;
  Range<M> range{low[c], high[c]};
  if (partial != nullptr) range = averaging.update(range, channel_range(partial, count));
  if (threadIdx.x != 0) return;
  const Grid<M> grid = grid_from_range(range, quant_min, quant_max, symmetric);
  low[c] = range.low;
  high[c] = range.high;
  scale[c] = grid.scale;
  zero_point[c] = grid.zero_point;
}

template <class T>
Tensor partial_ranges(const Tensor& x, const Slices& slices) {
  Tensor partial = empty_vector(x, 3 * slices.walk.channels * slices.count, math_type(x));
  range_kernel<T><<<slices.grid(), kThreads, 0, current_stream(x)>>>(data<T>(x), slices, output<math_t<T>>(partial));
  check_launch();
  return partial;
}

std::tuple<Tensor, Tensor> observe_min_max(const Tensor& x, std::optional<int64_t> axis, bool channels_last) {
  STD_TORCH_CHECK(x.numel() > 0, "x is empty: there is no smallest value");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Slices slices(walk_of(x, axis, channels_last));
  const Tensor input = in_order(x, channels_last);
  const auto make = [&] {
    return axis.has_value() ? empty_vector(x, slices.walk.channels, math_type(x)) : empty_scalar(x, math_type(x));
  };
  Tensor low = make(), high = make();
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const Tensor partial = partial_ranges<T>(input, slices);
    finish_range_kernel<M><<<static_cast<unsigned>(slices.walk.channels), kThreads, 0, current_stream(x)>>>(
        data<M>(partial), slices.count, output<M>(low), output<M>(high));
    check_launch();
  });
  return {low, high};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> observe_fake_quantize(
    const Tensor& x, const Tensor& range_min, const Tensor& range_max, int64_t quant_min, int64_t quant_max,
    std::optional<double> averaging, bool symmetric, std::optional<int64_t> axis, bool channels_last,
    bool save_mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("range_min", range_min, x, walk.channels, math_type(x));
  check_parameters("range_max", range_max, x, walk.channels, math_type(x));
  const Tensor input = in_order(x, channels_last);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  Tensor low = torch::stable::clone(torch::stable::contiguous(range_min));
  Tensor high = torch::stable::clone(torch::stable::contiguous(range_max));
  Tensor scale = empty_vector(x, walk.channels, math_type(x));
  Tensor zero_point = empty_vector(x, walk.channels, ScalarType::Int);
  if (walk.channels == 0) return {y, low, high, scale, zero_point, mask};
  const Averaging rule{!averaging.has_value(), averaging.value_or(1.0)};
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const Slices slices(walk);
    const bool empty = walk.numel() == 0;
    const Tensor partial = empty ? low : partial_ranges<T>(input, slices);
    settle_kernel<M><<<static_cast<unsigned>(walk.channels), kThreads, 0, current_stream(x)>>>(
        empty ? nullptr : data<M>(partial), slices.count, output<M>(low), output<M>(high), output<M>(scale),
        output<int32_t>(zero_point), rule, quant_min, quant_max, symmetric);
    check_launch();
    launch_quantize<T>(input, y, save_mask ? &mask : nullptr, walk, scale, zero_point, quant_min, quant_max);
  });
  return {y, low, high, scale, zero_point, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) {
  m.impl("observe_min_max", TORCH_BOX(&observe_min_max));
  m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize));
}

}  // namespace fxslim
