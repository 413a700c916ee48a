// fake_quantize_clipped and its backward on CUDA. Clips stay on the device: nothing waits for it.
#include "kernels.cuh"

namespace fxslim {
namespace {

template <class M>
__global__ void grid_kernel(
    const M* clip_min, const M* clip_max, int64_t quant_min, int64_t quant_max, M* scale, int32_t* zero_point) {
  const Grid<M> grid = grid_between(*clip_min, *clip_max, quant_min, quant_max);
  *scale = grid.scale;
  *zero_point = grid.zero_point;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_clipped(
    const Tensor& x, const Tensor& clip_min, const Tensor& clip_max, int64_t quant_min, int64_t quant_max,
    bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_parameters("clip_min", clip_min, x, 1, math_type(x));
  check_parameters("clip_max", clip_max, x, 1, math_type(x));
  const Walk walk = walk_of(x, std::nullopt, channels_last);
  const Tensor input = in_order(x, channels_last);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor scale = empty_vector(x, 1, math_type(x)), zero_point = empty_vector(x, 1, ScalarType::Int);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    grid_kernel<M><<<1, 1, 0, current_stream(x)>>>(
        data<M>(clip_min), data<M>(clip_max), quant_min, quant_max, output<M>(scale), output<int32_t>(zero_point));
    check_launch();
    launch_quantize<T>(input, y, nullptr, walk, scale, zero_point, quant_min, quant_max);
  });
  return {y, scale, zero_point};
}

// What rounding adds, in steps.
template <class M>
__device__ M error_of(M value, M scale) {
  const M t = value / scale;
  return std::nearbyint(t) - t;
}

template <class T>
__global__ void backward_kernel(
    const T* x, const T* grad, T* grad_x, Slices slices, const math_t<T>* clip_min, const math_t<T>* clip_max,
    int64_t quant_min, int64_t quant_max, double* partial_min, double* partial_max) {
  using M = math_t<T>;
  const Grid<M> grid = grid_between(*clip_min, *clip_max, quant_min, quant_max);
  const M lower = grid.scale * static_cast<M>(quant_min - grid.zero_point);
  const M upper = grid.scale * static_cast<M>(quant_max - grid.zero_point);
  double inside = 0, over = 0, under = 0;
  for (int64_t k = slices.begin() + threadIdx.x; k < slices.end(); k += kThreads) {
    const M value = static_cast<M>(x[k]), g = static_cast<M>(grad[k]);
    const bool above = value > upper, below = value < lower;
    if (above) over += static_cast<double>(g);
    else if (below) under += static_cast<double>(g);
    else inside += static_cast<double>(g * error_of(value, grid.scale));
    grad_x[k] = above || below ? static_cast<T>(M(0)) : grad[k];
  }
  inside = combine_block(inside, Add{});
  over = combine_block(over, Add{});
  under = combine_block(under, Add{});
  if (threadIdx.x != 0) return;
  const double past = over * static_cast<double>(error_of(*clip_max, grid.scale)) +
                      under * static_cast<double>(error_of(*clip_min, grid.scale));
  const double error = (inside + past) / static_cast<double>(quant_max - quant_min);
  partial_min[slices.partial()] = under - error;
  partial_max[slices.partial()] = over + error;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_clipped_backward(
    const Tensor& grad, const Tensor& x, const Tensor& clip_min, const Tensor& clip_max, int64_t quant_min,
    int64_t quant_max, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_parameters("clip_min", clip_min, x, 1, math_type(x));
  check_parameters("clip_max", clip_max, x, 1, math_type(x));
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad and x differ in dtype");
  const Slices slices(walk_of(x, std::nullopt, channels_last));
  const Tensor input = in_order(x, channels_last), grads = in_order(grad, channels_last);
  Tensor grad_x = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor grad_min = empty_vector(x, 1, math_type(x)), grad_max = empty_vector(x, 1, math_type(x));
  Tensor partial_min = empty_vector(x, slices.count, ScalarType::Double);
  Tensor partial_max = empty_vector(x, slices.count, ScalarType::Double);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const cudaStream_t stream = current_stream(x);
    backward_kernel<T><<<slices.grid(), kThreads, 0, stream>>>(
        data<T>(input), data<T>(grads), output<T>(grad_x), slices, data<M>(clip_min), data<M>(clip_max), quant_min,
        quant_max, output<double>(partial_min), output<double>(partial_max));
    check_launch();
    sum_partials_kernel<M><<<1, kThreads, 0, stream>>>(data<double>(partial_min), slices.count, 1.0, output<M>(grad_min));
    sum_partials_kernel<M><<<1, kThreads, 0, stream>>>(data<double>(partial_max), slices.count, 1.0, output<M>(grad_max));
    check_launch();
  });
  return {grad_x, grad_min, grad_max};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) {
  m.impl("fake_quantize_clipped", TORCH_BOX(&fake_quantize_clipped));
  m.impl("fake_quantize_clipped_backward", TORCH_BOX(&fake_quantize_clipped_backward));
}

}  // namespace fxslim
