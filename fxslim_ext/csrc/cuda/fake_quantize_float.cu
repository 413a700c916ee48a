// fake_quantize_float on CUDA.
#include "../float_grid.h"
#include "kernels.cuh"

namespace fxslim {
namespace {

// A NaN is none of the two, so it stays.
template <class M>
__device__ M within(M v, M bound) {
  v = v < -bound ? -bound : v;
  return v > bound ? bound : v;
}

// y and the clip mask: a thread makes one byte of the mask.
template <class T>
__global__ void quantize_float_kernel(
    const T* x, T* y, uint8_t* mask, int64_t numel, ChannelOf channel_of, const math_t<T>* scales,
    FloatGrid<math_t<T>> grid) {
  using M = math_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < numel; i += step) {
    unsigned byte = 0;
    for (int k = 0; k < 8 && i + k < numel; ++k) {
      const M scale = usable_scale(scales[channel_of(i + k)]);
      // Twice the largest value is still seen as clipped, and can be rounded.
      const M rounded = grid(within(static_cast<M>(x[i + k]) / scale, 2 * grid.largest));
      y[i + k] = static_cast<T>(within(rounded, grid.largest) * scale);
      byte |= (rounded >= -grid.largest && rounded <= grid.largest ? 1u : 0u) << k;
    }
    if (mask != nullptr) mask[i / 8] = static_cast<uint8_t>(byte);
  }
}

std::tuple<Tensor, Tensor> fake_quantize_float(
    const Tensor& x, const Tensor& scale, int64_t mantissa_bits, int64_t least_exponent, double largest,
    std::optional<int64_t> axis, bool channels_last, bool save_mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  const Tensor input = in_order(x, channels_last), scales = torch::stable::contiguous(scale);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor mask = empty_vector(x, save_mask ? mask_bytes(walk.numel()) : 0, ScalarType::Byte);
  if (walk.numel() == 0) return {y, mask};
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    quantize_float_kernel<T><<<blocks_for(mask_bytes(walk.numel())), kThreads, 0, current_stream(x)>>>(
        data<T>(input), output<T>(y), save_mask ? output<uint8_t>(mask) : nullptr, walk.numel(), ChannelOf(walk),
        data<M>(scales), FloatGrid<M>(mantissa_bits, least_exponent, largest));
    check_launch();
  });
  return {y, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) {
  m.impl("fake_quantize_float", TORCH_BOX(&fake_quantize_float));
}

}  // namespace fxslim
