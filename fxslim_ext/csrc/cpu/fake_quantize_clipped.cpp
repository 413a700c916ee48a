// fake_quantize_clipped and its backward on the CPU.
#include "channel_reduction.h"
#include "quantize.h"

namespace fxslim {
namespace {

template <class M>
M value_of(const Tensor& scalar) {
  return *static_cast<const M*>(scalar.const_data_ptr());
}

void check_clips(const Tensor& x, const Tensor& clip_min, const Tensor& clip_max) {
  check_parameters("clip_min", clip_min, x, 1, math_type(x));
  check_parameters("clip_max", clip_max, x, 1, math_type(x));
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_clipped(
    const Tensor& x, const Tensor& clip_min, const Tensor& clip_max, int64_t quant_min, int64_t quant_max,
    bool channels_last) {
  check_clips(x, clip_min, clip_max);
  const Walk walk = walk_of(x, std::nullopt, channels_last);
  const Tensor input = in_order(x, channels_last);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor scale = empty_vector(x, 1, math_type(x)), zero_point = empty_vector(x, 1, ScalarType::Int);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const Grid<M> grid = grid_between(value_of<M>(clip_min), value_of<M>(clip_max), quant_min, quant_max);
    *static_cast<M*>(scale.mutable_data_ptr()) = grid.scale;
    *static_cast<int32_t*>(zero_point.mutable_data_ptr()) = grid.zero_point;
    const GridTable<M> table(walk, &grid.scale, &grid.zero_point, quant_min, quant_max, false);
    quantize_tensor<T>(
        static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), nullptr, table);
  });
  return {y, scale, zero_point};
}

// What the loop needs: the values at which clipping starts.
template <class M>
struct Clips {
  M scale, lower, upper;
};

// What the loop adds up: gradients times rounding errors (in steps) inside, gradients above and below.
enum Part { kInside, kAbove, kBelow, kParts };

template <class M>
FXSLIM_INLINE inline void clip_gradients(
    const M* __restrict x, const M* __restrict grad, M* __restrict grad_x, int64_t n, const Clips<M>& clips,
    double* sums) {
  const Clips<M> c = clips;
  double inside = 0, above = 0, below = 0;
#pragma omp simd reduction(+ : inside, above, below)
  for (int64_t i = 0; i < n; ++i) {
    const bool is_above = x[i] > c.upper, is_below = x[i] < c.lower;
    const M t = x[i] / c.scale;
    const M error = grad[i] * (round_half_even(t) - t);
    inside += static_cast<double>(is_above || is_below ? M(0) : error);
    above += static_cast<double>(is_above ? grad[i] : M(0));
    below += static_cast<double>(is_below ? grad[i] : M(0));
    grad_x[i] = is_above || is_below ? M(0) : grad[i];
  }
  sums[kInside] += inside;
  sums[kAbove] += above;
  sums[kBelow] += below;
}

// The error of a clip itself, in steps: what everything past it is off by.
template <class M>
double error_of(M clip, M scale) {
  const M t = clip / scale;
  return static_cast<double>(round_half_even(t) - t);
}

template <class T>
void backward_run(
    const T* x, const T* grad, T* grad_x, int64_t begin, int64_t end, const Clips<math_t<T>>& clips, double* sums) {
  using M = math_t<T>;
  alignas(64) M x_buffer[kBlock], grad_buffer[kBlock], out_buffer[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const M* values = load_block(x + i, x_buffer, n);
    const M* grads = load_block(grad + i, grad_buffer, n);
    M* out = output_block(grad_x + i, out_buffer);
    for_best_cpu([&]() FXSLIM_INLINE { clip_gradients(values, grads, out, n, clips, sums); });
    store_block(out, grad_x + i, n);
  }
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_clipped_backward(
    const Tensor& grad, const Tensor& x, const Tensor& clip_min, const Tensor& clip_max, int64_t quant_min,
    int64_t quant_max, bool channels_last) {
  check_clips(x, clip_min, clip_max);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad and x differ in dtype");
  const Walk walk = walk_of(x, std::nullopt, channels_last);
  const Tensor input = in_order(x, channels_last), grads = in_order(grad, channels_last);
  Tensor grad_x = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor grad_min = empty_vector(x, 1, math_type(x)), grad_max = empty_vector(x, 1, math_type(x));
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const M low = value_of<M>(clip_min), high = value_of<M>(clip_max);
    const Grid<M> grid = grid_between(low, high, quant_min, quant_max);
    const Clips<M> clips{
        grid.scale, grid.scale * static_cast<M>(quant_min - grid.zero_point),
        grid.scale * static_cast<M>(quant_max - grid.zero_point)};
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    const auto* from_grad = static_cast<const T*>(grads.const_data_ptr());
    auto* to = static_cast<T*>(grad_x.mutable_data_ptr());
    const std::vector<double> sums = reduce_channels<kParts, double>(
        walk, [](int64_t) { return 0.0; },
        [&](int64_t begin, int64_t end, int64_t, double* acc) {
          backward_run(from, from_grad, to, begin, end, clips, acc);
        },
        [](int64_t, int64_t, double*, int64_t) {},
        [](double* into, int64_t a, const double* part, int64_t b) {
          for (int64_t k = 0; k < kParts; ++k) into[k * a] += part[k * b];
        });
    const double error = (sums[kInside] + sums[kAbove] * error_of(high, grid.scale) +
                          sums[kBelow] * error_of(low, grid.scale)) /
                         static_cast<double>(quant_max - quant_min);
    *static_cast<M*>(grad_min.mutable_data_ptr()) = static_cast<M>(sums[kBelow] - error);
    *static_cast<M*>(grad_max.mutable_data_ptr()) = static_cast<M>(sums[kAbove] + error);
  });
  return {grad_x, grad_min, grad_max};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) {
  m.impl("fake_quantize_clipped", TORCH_BOX(&fake_quantize_clipped));
  m.impl("fake_quantize_clipped_backward", TORCH_BOX(&fake_quantize_clipped_backward));
}

}  // namespace fxslim
