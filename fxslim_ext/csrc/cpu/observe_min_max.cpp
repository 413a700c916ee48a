// observe_min_max on the CPU.
#include "ranges.h"

namespace fxslim {
namespace {

std::tuple<Tensor, Tensor> observe_min_max(const Tensor& x, std::optional<int64_t> axis, bool channels_last) {
  STD_TORCH_CHECK(x.numel() > 0, "x is empty: there is no smallest value");
  const Walk walk = walk_of(x, axis, channels_last);
  const Tensor input = in_order(x, channels_last);
  const auto make = [&] {
    return axis.has_value() ? empty_vector(x, walk.channels, math_type(x)) : empty_scalar(x, math_type(x));
  };
  Tensor low = make(), high = make();
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto ranges = channel_ranges(static_cast<const T*>(input.const_data_ptr()), walk);
    auto* lows = static_cast<math_t<T>*>(low.mutable_data_ptr());
    auto* highs = static_cast<math_t<T>*>(high.mutable_data_ptr());
    for (int64_t c = 0; c < walk.channels; ++c) {
      lows[c] = ranges[c].low;
      highs[c] = ranges[c].high;
    }
  });
  return {low, high};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("observe_min_max", TORCH_BOX(&observe_min_max)); }

}  // namespace fxslim
