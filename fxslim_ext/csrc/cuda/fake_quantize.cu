// fake_quantize and mask_gradient on CUDA.
#include "kernels.cuh"

namespace fxslim {
namespace {

std::tuple<Tensor, Tensor> fake_quantize(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
    std::optional<int64_t> axis, bool channels_last, bool save_mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  check_parameters("zero_point", zero_point, x, walk.channels, ScalarType::Int);
  const Tensor input = in_order(x, channels_last);
  const Tensor scales = torch::stable::contiguous(scale), zero_points = torch::stable::contiguous(zero_point);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_quantize<T>(input, y, save_mask ? &mask : nullptr, walk, scales, zero_points, quant_min, quant_max);
  });
  return {y, mask};
}

template <class Word>
__global__ void select_kernel(const Word* grad, const uint8_t* mask, Word* out, int64_t numel) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += step)
    out[i] = mask[i / 8] >> (i % 8) & 1 ? grad[i] : Word(0);
}

Tensor mask_gradient(const Tensor& grad, const Tensor& mask, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t numel = grad.numel();
  check_parameters("mask", mask, grad, mask_bytes(numel), ScalarType::Byte);
  const Tensor input = in_order(grad, channels_last), bits = torch::stable::contiguous(mask);
  Tensor out = empty_in_order(grad, grad.scalar_type(), channels_last);
  if (numel == 0) return out;
  for_float_type(grad.scalar_type(), [&](auto zero) {
    using Word = std::conditional_t<
        sizeof(zero) == 2, uint16_t, std::conditional_t<sizeof(zero) == 4, uint32_t, uint64_t>>;
    select_kernel<Word><<<blocks_for(numel), kThreads, 0, current_stream(grad)>>>(
        data<Word>(input), data<uint8_t>(bits), output<Word>(out), numel);
    check_launch();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("mask_gradient", TORCH_BOX(&mask_gradient));
}

}  // namespace fxslim
