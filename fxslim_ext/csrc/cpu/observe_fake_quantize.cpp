// observe_fake_quantize on the CPU: range, grid and values; channel by channel where a channel is one run.
#include "ranges.h"

namespace fxslim {
namespace {

template <class M>
struct Outputs {
  M *low, *high, *scale;
  int32_t* zero_point;
};

struct Settings {
  int64_t quant_min, quant_max;
  Averaging averaging;
  bool symmetric;

  // Stores the new range and grid of one channel; out.low and out.high hold the old range.
  template <class M>
  void settle(const Outputs<M>& out, int64_t c, const Range<M>& now) const {
    const Range<M> range = averaging.update(Range<M>{out.low[c], out.high[c]}, now);
    const Grid<M> grid = grid_from_range(range, quant_min, quant_max, symmetric);
    out.low[c] = range.low;
    out.high[c] = range.high;
    out.scale[c] = grid.scale;
    out.zero_point[c] = grid.zero_point;
  }
};

// Each channel is observed and quantized while it is in the cache.
template <class T>
void by_channel(const T* x, T* y, const Walk& walk, const Settings& settings, const Outputs<math_t<T>>& out) {
  using M = math_t<T>;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(walk.inner, 1));
  torch::stable::parallel_for(0, walk.channels, grain, [&](int64_t first, int64_t last) {
    GridTable<M> grid(Walk{1, 1, walk.inner});
    for (int64_t c = first; c < last; ++c) {
      M acc[3] = {range_start<M>(kLow), range_start<M>(kHigh), range_start<M>(kBad)};
      const int64_t at = c * walk.inner;
      extend_by_run(x, at, at + walk.inner, acc);
      settings.settle(out, c, range_of(acc, 1));
      grid.fill_whole(out.scale + c, out.zero_point + c, settings.quant_min, settings.quant_max, false);
      quantize_range(x + at, y + at, nullptr, 0, walk.inner, grid);
    }
  });
}

template <class M>
void copy_values(const Tensor& from, M* to, int64_t count) {
  const Tensor values = from.is_contiguous() ? from : torch::stable::contiguous(from);
  std::copy_n(static_cast<const M*>(values.const_data_ptr()), count, to);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> observe_fake_quantize(
    const Tensor& x, const Tensor& range_min, const Tensor& range_max, int64_t quant_min, int64_t quant_max,
    std::optional<double> averaging, bool symmetric, std::optional<int64_t> axis, bool channels_last,
    bool save_mask) {
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("range_min", range_min, x, walk.channels, math_type(x));
  check_parameters("range_max", range_max, x, walk.channels, math_type(x));
  const Tensor input = in_order(x, channels_last);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  Tensor low = empty_vector(x, walk.channels, math_type(x)), high = empty_vector(x, walk.channels, math_type(x));
  Tensor scale = empty_vector(x, walk.channels, math_type(x));
  Tensor zero_point = empty_vector(x, walk.channels, ScalarType::Int);
  const Averaging rule{!averaging.has_value(), averaging.value_or(1.0)};
  const Settings settings{quant_min, quant_max, rule, symmetric};
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const Outputs<M> out{
        static_cast<M*>(low.mutable_data_ptr()), static_cast<M*>(high.mutable_data_ptr()),
        static_cast<M*>(scale.mutable_data_ptr()), static_cast<int32_t*>(zero_point.mutable_data_ptr())};
    copy_values<M>(range_min, out.low, walk.channels);
    copy_values<M>(range_max, out.high, walk.channels);
    const T* from = static_cast<const T*>(input.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    if (walk.numel() == 0) {
      for (int64_t c = 0; c < walk.channels; ++c) {
        const Grid<M> grid = grid_from_range(Range<M>{out.low[c], out.high[c]}, quant_min, quant_max, symmetric);
        out.scale[c] = grid.scale;
        out.zero_point[c] = grid.zero_point;
      }
      return;
    }
    if (walk.outer == 1 && walk.channels > 1 && walk.inner >= 8 && !save_mask)
      return by_channel(from, to, walk, settings, out);
    const auto ranges = channel_ranges(from, walk);
    for (int64_t c = 0; c < walk.channels; ++c) settings.settle(out, c, ranges[c]);
    const GridTable<M> grid(walk, out.scale, out.zero_point, quant_min, quant_max, save_mask);
    quantize_tensor(from, to, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, grid);
  });
  return {y, low, high, scale, zero_point, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize)); }

}  // namespace fxslim
