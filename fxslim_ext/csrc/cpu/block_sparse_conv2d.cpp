// block_sparse_conv2d on the CPU: only the blocks that are stored are multiplied, in float32. Halves and bfloat16 are
// widened first and rounded once.
#include "block_tiles.h"
#include "numbers.h"

namespace fxslim {
namespace {

using FloatTile = Tile<float, float>;

struct Portable {
  using In = float;
  using Weight = float;
  static constexpr int64_t kPixels = 4, kPanels = 1;

  template <int64_t Pixels, int64_t Panels>
  static void run(const FloatTile& t) {
    float sums[Pixels][kPanel];
    for (int64_t i = 0; i < Pixels; ++i)
      for (int64_t o = 0; o < kPanel; ++o) sums[i][o] = t.first ? t.bias[o] : t.sums[i * t.sum_step + o];
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const float* w = block.weights;
      for (int64_t k = 0; k < block.depth; ++k, w += kPanel)
        for (int64_t i = 0; i < Pixels; ++i)
          for (int64_t o = 0; o < kPanel; ++o) sums[i][o] += block.rows[i][block.at + k] * w[o];
    }
    for (int64_t i = 0; i < Pixels; ++i)
      for (int64_t o = 0; o < kPanel; ++o)
        t.sums[i * t.sum_step + o] = t.last && t.relu && sums[i][o] < 0.0f ? 0.0f : sums[i][o];
  }
};

#if FXSLIM_X86
// Three pixels and two panels read least for a product, and share what they read with the next panels least often.
struct Avx2 {
  using In = float;
  using Weight = float;
  static constexpr int64_t kPixels = 3, kPanels = 2;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX2 static void run(const FloatTile& t) {
    __m256 sums[Pixels][Panels * 2];
    const float* x[Pixels];
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < 2 * Panels; ++v)
        sums[i][v] = _mm256_loadu_ps((t.first ? t.bias : t.sums + i * t.sum_step) + v * 8);
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const float* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; ++k, w += kPanel) {
        __m256 value[Pixels];
#pragma GCC unroll 6
        for (int64_t i = 0; i < Pixels; ++i) value[i] = _mm256_broadcast_ss(x[i] + k);
#pragma GCC unroll 4
        for (int64_t v = 0; v < 2 * Panels; ++v) {
          const __m256 weight = _mm256_loadu_ps(w + v / 2 * t.panel_step + v % 2 * 8);
#pragma GCC unroll 6
          for (int64_t i = 0; i < Pixels; ++i) sums[i][v] = _mm256_fmadd_ps(value[i], weight, sums[i][v]);
        }
      }
    }
    const bool clamps = t.last && t.relu;
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < 2 * Panels; ++v) {
        if (clamps) sums[i][v] = _mm256_max_ps(_mm256_setzero_ps(), sums[i][v]);
        _mm256_storeu_ps(t.sums + i * t.sum_step + v * 8, sums[i][v]);
      }
  }
};

struct Avx512 {
  using In = float;
  using Weight = float;
  static constexpr int64_t kPixels = 6, kPanels = 4;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX512 static void run(const FloatTile& t) {
    __m512 sums[Pixels][Panels];
    const float* x[Pixels];
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p)
        sums[i][p] = _mm512_loadu_ps((t.first ? t.bias : t.sums + i * t.sum_step) + p * kPanel);
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const float* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; ++k, w += kPanel) {
        __m512 weights[Panels];
#pragma GCC unroll 4
        for (int64_t p = 0; p < Panels; ++p) weights[p] = _mm512_loadu_ps(w + p * t.panel_step);
#pragma GCC unroll 6
        for (int64_t i = 0; i < Pixels; ++i) {
          const __m512 value = _mm512_set1_ps(x[i][k]);
#pragma GCC unroll 4
          for (int64_t p = 0; p < Panels; ++p) sums[i][p] = _mm512_fmadd_ps(value, weights[p], sums[i][p]);
        }
      }
    }
    const bool clamps = t.last && t.relu;
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p) {
        if (clamps) sums[i][p] = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), sums[i][p]);
        _mm512_storeu_ps(t.sums + i * t.sum_step + p * kPanel, sums[i][p]);
      }
  }
};
#endif

// Values of a tensor that are converted at once.
constexpr int64_t kConverted = 32768;

template <class Body>
void in_pieces(int64_t numel, const Body& body) {
  torch::stable::parallel_for(0, (numel + kConverted - 1) / kConverted, 1, [&](int64_t first, int64_t last) {
    body(first * kConverted, std::min(numel, last * kConverted) - first * kConverted);
  });
}

// The values as float32: the tensor itself where they are.
Tensor widened(const Tensor& x) {
  const Tensor from = torch::stable::contiguous(x);
  if (x.scalar_type() == ScalarType::Float) return from;
  Tensor wide = torch::stable::new_empty(from, from.sizes(), ScalarType::Float);
  auto* to = static_cast<float*>(wide.mutable_data_ptr());
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<math_t<T>, float>) {
      const auto* values = static_cast<const T*>(from.const_data_ptr());
      in_pieces(x.numel(), [&](int64_t begin, int64_t n) { load_block(values + begin, to + begin, n); });
    }
  });
  return wide;
}

// The values rounded to another type: the tensor itself where that is float32.
Tensor narrowed(const Tensor& wide, ScalarType dtype) {
  if (dtype == ScalarType::Float) return wide;
  Tensor result = torch::stable::new_empty(wide, wide.sizes(), dtype);
  const auto* from = static_cast<const float*>(wide.const_data_ptr());
  for_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<math_t<T>, float>) {
      auto* to = static_cast<T*>(result.mutable_data_ptr());
      in_pieces(wide.numel(), [&](int64_t begin, int64_t n) { store_block(from + begin, to + begin, n); });
    }
  });
  return result;
}

Tensor block_sparse_conv2d(
    const Tensor& input, const Tensor& blocks, const Tensor& places, const Tensor& starts,
    const std::optional<Tensor>& bias, int64_t num_out, int64_t cout, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    bool relu) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "the input must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(blocks.dim() == 4, "blocks have ", blocks.dim(), " dims, not 4");
  STD_TORCH_CHECK(blocks.scalar_type() == dtype, "blocks have another dtype than the input");
  const BlockConvolution conv(input, num_out, cout, blocks.size(2), kernel_size, stride, padding, dilation);
  const Tensor x = widened(input), weights = widened(blocks);
  const PackedBlocks packed(input, conv, weights, places, starts, ScalarType::Float, conv.panels * kPanel * blocks.size(2));
  packed.check_places(conv);
  std::optional<Tensor> biases;
  if (bias.has_value()) {
    check_parameters("bias", *bias, input, num_out, dtype);
    biases = widened(*bias);
  }
  Tensor output = conv.empty_output(x);
  if (output.numel() == 0) return narrowed(output, dtype);
  const std::vector<float> zeros(conv.channels);
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  const auto* added = biases.has_value() ? static_cast<const float*>(biases->const_data_ptr()) : nullptr;
  auto* to = static_cast<float*>(output.mutable_data_ptr());
  const auto compute = [&](auto kernel) {
    using Kernel = decltype(kernel);
    BlockSum<Kernel>(conv, from, conv.channels, blocks.size(2), zeros.data(), packed, {nullptr, added, nullptr}, relu, to).run();
  };
#if FXSLIM_X86
  if (instruction_set() >= InstructionSet::avx512) compute(Avx512());
  else if (instruction_set() == InstructionSet::avx2) compute(Avx2());
  else
#endif
    compute(Portable());
  return narrowed(output, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("block_sparse_conv2d", TORCH_BOX(&block_sparse_conv2d)); }

}  // namespace fxslim
