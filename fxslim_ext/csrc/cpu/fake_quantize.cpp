// fake_quantize and mask_gradient on the CPU.
#include "quantize.h"

namespace fxslim {
namespace {

std::tuple<Tensor, Tensor> fake_quantize(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
    std::optional<int64_t> axis, bool channels_last, bool save_mask) {
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  check_parameters("zero_point", zero_point, x, walk.channels, ScalarType::Int);
  const Tensor input = in_order(x, channels_last);
  const Tensor scales = torch::stable::contiguous(scale), zero_points = torch::stable::contiguous(zero_point);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const GridTable<math_t<T>> grid(
        walk, static_cast<const math_t<T>*>(scales.const_data_ptr()),
        static_cast<const int32_t*>(zero_points.const_data_ptr()), quant_min, quant_max, save_mask);
    quantize_tensor(
        static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
        save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, grid);
  });
  return {y, mask};
}

// Keeps grad where the mask's bit is set, zero elsewhere: a selection of words, whatever their type.
template <class Word>
void select_words(const Word* grad, const uint8_t* bits, Word* out, int64_t numel) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kGrain / kBlock, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kBlock, n = std::min(numel, last * kBlock) - begin;
    select_by_bits(grad + begin, bits + begin / 8, out + begin, n);
  });
}

Tensor mask_gradient(const Tensor& grad, const Tensor& mask, bool channels_last) {
  const int64_t numel = grad.numel();
  check_parameters("mask", mask, grad, mask_bytes(numel), ScalarType::Byte);
  const Tensor input = in_order(grad, channels_last);
  const Tensor packed = torch::stable::contiguous(mask);
  Tensor out = empty_in_order(grad, grad.scalar_type(), channels_last);
  const void* from = input.const_data_ptr();
  const auto* bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* to = out.mutable_data_ptr();
  for_float_type(grad.scalar_type(), [&](auto zero) {
    using Word = std::conditional_t<
        sizeof(zero) == 2, uint16_t, std::conditional_t<sizeof(zero) == 4, uint32_t, uint64_t>>;
    select_words(static_cast<const Word*>(from), bits, static_cast<Word*>(to), numel);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("mask_gradient", TORCH_BOX(&mask_gradient));
}

}  // namespace fxslim
