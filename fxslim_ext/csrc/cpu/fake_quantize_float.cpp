// fake_quantize_float on the CPU.
#include "quantize.h"

namespace fxslim {
namespace {

std::tuple<Tensor, Tensor> fake_quantize_float(
    const Tensor& x, const Tensor& scale, int64_t mantissa_bits, int64_t least_exponent, double largest,
    std::optional<int64_t> axis, bool channels_last, bool save_mask) {
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  const Tensor input = in_order(x, channels_last), scales = torch::stable::contiguous(scale);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const FloatGrid<M> rounding(mantissa_bits, least_exponent, largest);
    const GridTable<M> grid(walk, static_cast<const M*>(scales.const_data_ptr()), rounding, save_mask);
    quantize_tensor(
        static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
        save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, grid, rounding);
  });
  return {y, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) {
  m.impl("fake_quantize_float", TORCH_BOX(&fake_quantize_float));
}

}  // namespace fxslim
