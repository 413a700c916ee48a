// fake_quantize_learned and its backward on the CPU.
#include "channel_reduction.h"
#include "quantize.h"

namespace fxslim {
namespace {

template <class M>
GridTable<M> grid_table(
    const Walk& walk, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  const Tensor scales = torch::stable::contiguous(scale), zero_points = torch::stable::contiguous(zero_point);
  return GridTable<M>(
      walk, static_cast<const M*>(scales.const_data_ptr()), static_cast<const int32_t*>(zero_points.const_data_ptr()),
      quant_min, quant_max, false);
}

Tensor fake_quantize_learned(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
    std::optional<double> /*grad_factor*/, std::optional<int64_t> axis, bool channels_last) {
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  check_parameters("zero_point", zero_point, x, walk.channels, ScalarType::Int);
  const Tensor input = in_order(x, channels_last);
  Tensor y = empty_in_order(x, x.scalar_type(), channels_last);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    quantize_tensor<T>(
        static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), nullptr,
        grid_table<math_t<T>>(walk, scale, zero_point, quant_min, quant_max));
  });
  return y;
}

// Slope of the scale at one element, and whether the gradient of x passes.
template <class M>
FXSLIM_INLINE inline M scale_slope(M x, M scale, M low, M high, bool& kept) {
  const M steps = x / scale;
  M rounded = steps < low - 1 ? low - 1 : steps;
  rounded = rounded > high + 1 ? high + 1 : rounded;
  rounded = round_half_even(rounded);
  kept = (rounded >= low) & (rounded <= high);
  M slope = rounded - steps;
  slope = rounded < low ? low : slope;
  return rounded > high ? high : slope;
}

template <class M>
FXSLIM_INLINE inline void learned_run(
    const M* __restrict x, const M* __restrict grad, M* __restrict grad_x, int64_t n, M scale, M low, M high,
    double* sum_) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    bool kept;
    sum += static_cast<double>(grad[i] * scale_slope(x[i], scale, low, high, kept));
    grad_x[i] = kept ? grad[i] : M(0);
  }
  *sum_ += sum;
}

template <class M>
FXSLIM_INLINE inline void learned_each(
    const M* __restrict x, const M* __restrict grad, M* __restrict grad_x, int64_t n, const M* __restrict scale,
    const M* __restrict low, const M* __restrict high, double* __restrict sums) {
  for (int64_t i = 0; i < n; ++i) {
    bool kept;
    sums[i] += static_cast<double>(grad[i] * scale_slope(x[i], scale[i], low[i], high[i], kept));
    grad_x[i] = kept ? grad[i] : M(0);
  }
}

// Elements [begin, end) of the tensor: one sum (table = 0), or one per table entry.
template <class T>
void backward_range(
    const T* x, const T* grad, T* grad_x, int64_t begin, int64_t end, const GridTable<math_t<T>>& grid, double* sums,
    int64_t table) {
  using M = math_t<T>;
  alignas(64) M x_buffer[kBlock], grad_buffer[kBlock], out_buffer[kBlock];
  for (int64_t i = begin; i < end;) {
    int64_t n = std::min(kBlock, end - i);
    const int64_t at = table > 0 ? (i - begin) % table : i / grid.walk.inner % grid.walk.channels;
    if (table > 0) n = std::min(n, table - at);
    const M* values = load_block(x + i, x_buffer, n);
    const M* grads = load_block(grad + i, grad_buffer, n);
    M* out = output_block(grad_x + i, out_buffer);
    const M *s = &grid.scale[at], *lo = &grid.low[at], *hi = &grid.high[at];
    for_best_cpu([&]() FXSLIM_INLINE {
      if (table > 0) learned_each(values, grads, out, n, s, lo, hi, sums + at);
      else learned_run(values, grads, out, n, *s, *lo, *hi, sums);
    });
    store_block(out, grad_x + i, n);
    i += n;
  }
}

std::tuple<Tensor, Tensor> fake_quantize_learned_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<double> grad_factor, std::optional<int64_t> axis, bool channels_last) {
  const Walk walk = walk_of(x, axis, channels_last);
  check_parameters("scale", scale, x, walk.channels, math_type(x));
  check_parameters("zero_point", zero_point, x, walk.channels, ScalarType::Int);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad and x differ in dtype");
  const Tensor input = in_order(x, channels_last), grads = in_order(grad, channels_last);
  Tensor grad_x = empty_in_order(x, x.scalar_type(), channels_last);
  Tensor grad_scale = empty_vector(x, walk.channels, math_type(x));
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const GridTable<M> grid = grid_table<M>(walk, scale, zero_point, quant_min, quant_max);
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    const auto* from_grad = static_cast<const T*>(grads.const_data_ptr());
    auto* to = static_cast<T*>(grad_x.mutable_data_ptr());
    const std::vector<double> sums = reduce_channels<1, double>(
        walk, [](int64_t) { return 0.0; },
        [&](int64_t begin, int64_t end, int64_t, double* acc) {
          backward_range(from, from_grad, to, begin, end, grid, acc, 0);
        },
        [&](int64_t begin, int64_t end, double* acc, int64_t table) {
          backward_range(from, from_grad, to, begin, end, grid, acc, table);
        },
        [](double* into, int64_t, const double* part, int64_t) { *into += *part; });
    auto* result = static_cast<M*>(grad_scale.mutable_data_ptr());
    const double factor = grad_factor.value_or(learning_factor(walk.outer * walk.inner, quant_max));
    for (int64_t c = 0; c < walk.channels; ++c) result[c] = static_cast<M>(sums[c] * factor);
  });
  return {grad_x, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) {
  m.impl("fake_quantize_learned", TORCH_BOX(&fake_quantize_learned));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
}

}  // namespace fxslim
