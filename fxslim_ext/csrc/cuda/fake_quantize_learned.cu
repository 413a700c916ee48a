// fake_quantize_learned and its backward on CUDA.
#include "kernels.cuh"

namespace fxslim {
namespace {

Tensor fake_quantize_learned(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
    std::optional<double> /*grad_factor*/, std::optional<int64_t> axis, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  check_parameters("zero_point", zero_point, x, walk.channels, ScalarType::Int);
  const Tensor input = in_order(x, channels_last);
  const Tensor scales = torch::stable::contiguous(scale), zero_points = torch::stable::contiguous(zero_point);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_quantize<T>(input, y, nullptr, walk, scales, zero_points, quant_min, quant_max);
  });
  return y;
}

template <class T>
__global__ void backward_kernel(
    const T* x, const T* grad, T* grad_x, Slices slices, const math_t<T>* scales, const int32_t* zero_points,
    int quant_min, int quant_max, double* partial) {
  using M = math_t<T>;
  const int64_t c = blockIdx.x;
  const M scale = usable_scale(scales[c]);
  const M low = static_cast<M>(quant_min - zero_points[c]), high = static_cast<M>(quant_max - zero_points[c]);
  double sum = 0;
  for (int64_t k = slices.begin() + threadIdx.x; k < slices.end(); k += kThreads) {
    const int64_t i = slices.element(k);
    const M steps = static_cast<M>(x[i]) / scale, rounded = std::nearbyint(steps);
    const M slope = rounded < low ? low : rounded > high ? high : rounded - steps;
    sum += static_cast<double>(static_cast<M>(grad[i]) * slope);
    grad_x[i] = rounded >= low && rounded <= high ? grad[i] : static_cast<T>(M(0));
  }
  sum = combine_block(sum, Add{});
  if (threadIdx.x == 0) partial[slices.partial()] = sum;
}

std::tuple<Tensor, Tensor> fake_quantize_learned_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<double> grad_factor, std::optional<int64_t> axis, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Slices slices(walk_of(x, axis, channels_last));
  const int64_t channels = slices.walk.channels;
  check_parameters("scale", scale, x, channels, math_type(x));
  check_parameters("zero_point", zero_point, x, channels, ScalarType::Int);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad and x differ in dtype");
  const Tensor input = in_order(x, channels_last), grads = in_order(grad, channels_last);
  const Tensor scales = torch::stable::contiguous(scale), zero_points = torch::stable::contiguous(zero_point);
  Tensor grad_x = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor grad_scale = empty_vector(x, channels, math_type(x));
  Tensor partial = empty_vector(x, channels * slices.count, ScalarType::Double);
  if (channels == 0) return {grad_x, grad_scale};
  const double factor = grad_factor.value_or(learning_factor(slices.per_channel, quant_max));
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    backward_kernel<T><<<slices.grid(), kThreads, 0, current_stream(x)>>>(
        data<T>(input), data<T>(grads), output<T>(grad_x), slices, data<M>(scales), data<int32_t>(zero_points),
        static_cast<int>(quant_min), static_cast<int>(quant_max), output<double>(partial));
    check_launch();
    sum_partials_kernel<M><<<static_cast<unsigned>(channels), kThreads, 0, current_stream(x)>>>(
        data<double>(partial), slices.count, factor, output<M>(grad_scale));
    check_launch();
  });
  return {grad_x, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) {
  m.impl("fake_quantize_learned", TORCH_BOX(&fake_quantize_learned));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
}

}  // namespace fxslim
