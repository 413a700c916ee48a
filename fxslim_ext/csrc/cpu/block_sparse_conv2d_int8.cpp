// block_sparse_conv2d_int8 on the CPU: inputs become small integers first, sums are exact in 32 bits.
//
// With VNNI inputs are bytes, counted from the lowest step of their grid, and four products are added at once. Without,
// they are bytes only where no sum of two products leaves 16 bits. Else they are numbers of 16 bits, counted from the
// zero point, of which two are multiplied at once: channels 0 and 2 of four, then 1 and 3, as the bytes of a weight are
// widened most easily.
#include "block_tiles.h"
#include "quantize.h"

namespace fxslim {
namespace {

struct InputGrid {
  float scale, low, high;  // bounds in steps from the zero point
  int64_t lowest;          // the lowest step, from the zero point
};

FXSLIM_INLINE inline float to_steps(float x, const InputGrid& grid) {
  const float steps = x / grid.scale;
  // NaN becomes the lowest step: a number that an integer can hold.
  const float above = steps > grid.low ? steps : grid.low;
  return round_half_even(above < grid.high ? above : grid.high);
}

// Of four channels the second and the third change places.
FXSLIM_INLINE inline uint64_t middle_swapped(uint64_t four) {
  return (four & 0xffff00000000ffffull) | ((four & 0xffff0000ull) << 16) | ((four >> 16) & 0xffff0000ull);
}

struct Shorts {
  using In = int16_t;
  static constexpr ScalarType kType = ScalarType::Short;
  static int16_t padding(const InputGrid&) { return 0; }

  static FXSLIM_INLINE void fill(const float* from, int16_t* __restrict to, int64_t n, const InputGrid grid) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int16_t>(static_cast<int32_t>(to_steps(from[i], grid)));
  }
  static FXSLIM_INLINE void arrange(int16_t* values, int64_t n) {
    for (int64_t i = 0; i < n; i += kQuad) {
      uint64_t four;
      std::memcpy(&four, values + i, 8);
      four = middle_swapped(four);
      std::memcpy(values + i, &four, 8);
    }
  }
};

struct Bytes {
  using In = uint8_t;
  static constexpr ScalarType kType = ScalarType::Byte;
  static uint8_t padding(const InputGrid& grid) { return static_cast<uint8_t>(-grid.lowest); }

  // The grid is a copy: bytes that are written could lie in any other object.
  static FXSLIM_INLINE void fill(const float* from, uint8_t* __restrict to, int64_t n, const InputGrid grid) {
    const int32_t lowest = static_cast<int32_t>(grid.lowest);
    for (int64_t i = 0; i < n; ++i)
      to[i] = static_cast<uint8_t>(static_cast<int32_t>(to_steps(from[i], grid)) - lowest);
  }
  static FXSLIM_INLINE void arrange(uint8_t*, int64_t) {}
};

int64_t in_quads(int64_t channels) { return (channels + kQuad - 1) / kQuad * kQuad; }

// A pixel's channels, each block of them filled up to whole quads.
template <class Form>
Tensor quantized(const Tensor& input, const BlockConvolution& conv, const InputGrid& grid) {
  const int64_t pixels = conv.batch * conv.height * conv.width, quads = in_quads(conv.cin);
  // Blocks that are whole quads lie behind each other: they are filled as one.
  const bool whole = quads == conv.cin && conv.channels % kQuad == 0;
  const int64_t step = whole ? conv.channels : conv.cin, to_step = whole ? conv.channels : quads;
  const int64_t row = conv.over_channels * quads;
  Tensor result = torch::stable::new_empty(input, {pixels, row}, Form::kType);
  const auto* from = static_cast<const float*>(input.const_data_ptr());
  auto* to = static_cast<typename Form::In*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, pixels, std::max<int64_t>(1, 32768 / std::max<int64_t>(row, 1)), [&](int64_t first, int64_t last) {
    for_best_cpu([&]() FXSLIM_INLINE {
      for (int64_t p = first; p < last; ++p) {
        const float* x = from + p * conv.channels;
        typename Form::In* values = to + p * row;
        int64_t at = 0;
        for (int64_t c = 0; c < conv.channels; c += step, at += to_step) {
          const int64_t n = std::min(step, conv.channels - c);
          Form::fill(x + c, values + at, n, grid);
          std::fill_n(values + at + n, to_step - n, Form::padding(grid));
          Form::arrange(values + at, to_step);
        }
        std::fill_n(values + at, row - at, Form::padding(grid));
      }
    });
  });
  return result;
}

using ShortTile = Tile<int16_t, int8_t>;
using ByteTile = Tile<uint8_t, int8_t>;

struct Portable : Shorts {
  using Weight = int8_t;
  static constexpr int64_t kPixels = 2, kPanels = 1;

  template <int64_t Pixels, int64_t Panels>
  static void run(const ShortTile& t) {
    int32_t sums[Pixels][kPanel] = {};
    if (!t.first)
      for (int64_t i = 0; i < Pixels; ++i) std::memcpy(sums[i], t.sums + i * t.sum_step, sizeof sums[i]);
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const int8_t* w = block.weights;
      for (int64_t k = 0; k < block.depth; k += kQuad, w += kPanel * kQuad)
        for (int64_t i = 0; i < Pixels; ++i) {
          const int16_t* x = block.rows[i] + block.at + k;
          for (int64_t o = 0; o < kPanel; ++o) {
            const int8_t* v = w + o * kQuad;
            sums[i][o] += x[0] * v[0] + x[1] * v[2] + x[2] * v[1] + x[3] * v[3];
          }
        }
    }
    for (int64_t i = 0; i < Pixels; ++i) {
      float* to = t.sums + i * t.sum_step;
      if (!t.last) {
        std::memcpy(to, sums[i], sizeof sums[i]);
        continue;
      }
      for (int64_t o = 0; o < kPanel; ++o) {
        const float value = static_cast<float>(sums[i][o]) * t.factor[o] + t.bias[o];
        to[o] = t.relu && value < 0.0f ? 0.0f : value;
      }
    }
  }
};

#if FXSLIM_X86
FXSLIM_INLINE inline int32_t two_shorts(const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, 4);
  return both;
}

FXSLIM_INLINE inline int32_t four_bytes(const uint8_t* x) {
  int32_t all;
  std::memcpy(&all, x, 4);
  return all;
}

// The compiler must not gather whole numbers before it adds them: it has no registers for that.
#define FXSLIM_KEEP(sum) __asm__("" : "+v"(sum))

FXSLIM_AVX2 inline void store_avx2(__m256i sum, float* to, const float* factor, const float* bias, bool last, bool relu) {
  if (!last) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum);
  const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(factor));
  const __m256 value = _mm256_add_ps(product, _mm256_loadu_ps(bias));
  _mm256_storeu_ps(to, relu ? _mm256_max_ps(_mm256_setzero_ps(), value) : value);
}

struct Avx2 : Shorts {
  using Weight = int8_t;
  static constexpr int64_t kPixels = 6, kPanels = 1;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX2 static void run(const ShortTile& t) {
    __m256i sums[Pixels][2];
    const int16_t* x[Pixels];
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v)
        sums[i][v] = t.first ? _mm256_setzero_si256()
                             : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.sums + i * t.sum_step + v * 8));
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const int8_t* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; k += kQuad, w += kPanel * kQuad)
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
          __m256i weights[2];
#pragma GCC unroll 2
          for (int64_t v = 0; v < 2; ++v) {
            const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v * 32));
            weights[v] = _mm256_srai_epi16(half == 0 ? _mm256_slli_epi16(four, 8) : four, 8);
          }
#pragma GCC unroll 6
          for (int64_t i = 0; i < Pixels; ++i) {
            const __m256i two = _mm256_set1_epi32(two_shorts(x[i] + k + 2 * half));
            sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(two, weights[0]));
            sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(two, weights[1]));
            FXSLIM_KEEP(sums[i][0]);
            FXSLIM_KEEP(sums[i][1]);
          }
        }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v)
        store_avx2(sums[i][v], t.sums + i * t.sum_step + v * 8, t.factor + v * 8, t.bias + v * 8, t.last, t.relu);
  }
};

struct Avx2Bytes : Bytes {
  using Weight = int8_t;
  static constexpr int64_t kPixels = 6, kPanels = 1;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX2 static void run(const ByteTile& t) {
    __m256i sums[Pixels][2];
    const uint8_t* x[Pixels];
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v)
        sums[i][v] = _mm256_loadu_si256(
            t.first ? reinterpret_cast<const __m256i*>(t.start + v * 8)
                    : reinterpret_cast<const __m256i*>(t.sums + i * t.sum_step + v * 8));
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const int8_t* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; k += kQuad, w += kPanel * kQuad) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 6
        for (int64_t i = 0; i < Pixels; ++i) {
          const __m256i four = _mm256_set1_epi32(four_bytes(x[i] + k));
          sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(_mm256_maddubs_epi16(four, low), ones));
          sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(_mm256_maddubs_epi16(four, high), ones));
          FXSLIM_KEEP(sums[i][0]);
          FXSLIM_KEEP(sums[i][1]);
        }
      }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v)
        store_avx2(sums[i][v], t.sums + i * t.sum_step + v * 8, t.factor + v * 8, t.bias + v * 8, t.last, t.relu);
  }
};

// What both kernels for AVX-512 do with finished sums.
FXSLIM_AVX512 inline void store_avx512(__m512i sum, float* to, const float* factor, const float* bias, bool last, bool relu) {
  if (!last) return _mm512_storeu_si512(to, sum);
  const __m512 product = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, sum), _mm512_loadu_ps(factor));
  const __m512 value = _mm512_add_ps(product, _mm512_loadu_ps(bias));
  _mm512_storeu_ps(to, relu ? _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), value) : value);
}

struct Avx512 : Shorts {
  using Weight = int8_t;
  static constexpr int64_t kPixels = 6, kPanels = 4;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX512 static void run(const ShortTile& t) {
    __m512i sums[Pixels][Panels];
    const int16_t* x[Pixels];
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p)
        sums[i][p] = t.first ? _mm512_setzero_si512() : _mm512_loadu_si512(t.sums + i * t.sum_step + p * kPanel);
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const int8_t* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; k += kQuad, w += kPanel * kQuad)
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
          __m512i weights[Panels];
#pragma GCC unroll 4
          for (int64_t p = 0; p < Panels; ++p) {
            const __m512i four = _mm512_loadu_si512(w + p * t.panel_step);
            weights[p] = _mm512_srai_epi16(half == 0 ? _mm512_slli_epi16(four, 8) : four, 8);
          }
#pragma GCC unroll 6
          for (int64_t i = 0; i < Pixels; ++i) {
            const __m512i two = _mm512_set1_epi32(two_shorts(x[i] + k + 2 * half));
#pragma GCC unroll 4
            for (int64_t p = 0; p < Panels; ++p) {
              sums[i][p] = _mm512_add_epi32(sums[i][p], _mm512_madd_epi16(two, weights[p]));
              FXSLIM_KEEP(sums[i][p]);
            }
          }
        }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p)
        store_avx512(
            sums[i][p], t.sums + i * t.sum_step + p * kPanel, t.factor + p * kPanel, t.bias + p * kPanel, t.last, t.relu);
  }
};

struct Avx512Vnni : Bytes {
  using Weight = int8_t;
  static constexpr int64_t kPixels = 6, kPanels = 4;

  template <int64_t Pixels, int64_t Panels>
  FXSLIM_AVX512VNNI static void run(const ByteTile& t) {
    __m512i sums[Pixels][Panels];
    const uint8_t* x[Pixels];
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p)
        sums[i][p] = t.first ? _mm512_loadu_si512(t.start + p * kPanel)
                             : _mm512_loadu_si512(t.sums + i * t.sum_step + p * kPanel);
    for (int64_t b = 0; b < t.count; ++b) {
      const BlockOfTile block(t, b);
      const int8_t* w = block.weights;
#pragma GCC unroll 6
      for (int64_t i = 0; i < Pixels; ++i) x[i] = block.rows[i] + block.at;
      fetch_next<Pixels>(t, b);
      for (int64_t k = 0; k < block.depth; k += kQuad, w += kPanel * kQuad) {
        __m512i weights[Panels];
#pragma GCC unroll 4
        for (int64_t p = 0; p < Panels; ++p) weights[p] = _mm512_loadu_si512(w + p * t.panel_step);
#pragma GCC unroll 6
        for (int64_t i = 0; i < Pixels; ++i) {
          const __m512i four = _mm512_set1_epi32(four_bytes(x[i] + k));
#pragma GCC unroll 4
          for (int64_t p = 0; p < Panels; ++p) sums[i][p] = _mm512_dpbusd_epi32(sums[i][p], four, weights[p]);
        }
      }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < Pixels; ++i)
#pragma GCC unroll 4
      for (int64_t p = 0; p < Panels; ++p)
        store_avx512(
            sums[i][p], t.sums + i * t.sum_step + p * kPanel, t.factor + p * kPanel, t.bias + p * kPanel, t.last, t.relu);
  }
};
#endif

// What a pass over the weights tells.
struct OfBytes {
  std::vector<int32_t> starts;  // what sums of bytes are off by, counted from the lowest step
  int32_t most = 0;             // the largest sum of the magnitudes of two neighbours

  OfBytes(const BlockConvolution& conv, const PackedBlocks& packed, const InputGrid& grid)
      : starts(conv.over_filters * conv.panels * kPanel) {
    const int64_t width = conv.panels * kPanel, quads = in_quads(conv.cin) / kQuad;
    const auto* blocks = static_cast<const int8_t*>(packed.blocks.const_data_ptr());
    const auto* begins = static_cast<const int32_t*>(packed.starts.const_data_ptr());
    int32_t* const sums = starts.data();
    int32_t largest[kPanel] = {};
    for_best_cpu([&]() FXSLIM_INLINE {
      for (int64_t g = 0; g < conv.over_filters; ++g)
        for (int64_t panel = begins[g] * conv.panels; panel < begins[g + 1] * conv.panels; ++panel) {
          const int8_t* w = blocks + panel * quads * kPanel * kQuad;
          int32_t* to = sums + g * width + panel % conv.panels * kPanel;
          for (int64_t k = 0; k < quads; ++k, w += kPanel * kQuad)
            for (int64_t o = 0; o < kPanel; ++o) {
              const int32_t a = w[o * kQuad], b = w[o * kQuad + 1], c = w[o * kQuad + 2], d = w[o * kQuad + 3];
              to[o] += a + b + c + d;
              largest[o] = std::max(largest[o], std::max(std::abs(a) + std::abs(b), std::abs(c) + std::abs(d)));
            }
        }
    });
    for (int32_t& start : starts) start *= static_cast<int32_t>(grid.lowest);
    most = *std::max_element(largest, largest + kPanel);
  }
};

Tensor block_sparse_conv2d_int8(
    const Tensor& input, const Tensor& scale, int64_t zero_point, int64_t quant_min, int64_t quant_max,
    const Tensor& blocks, const Tensor& places, const Tensor& starts, const Tensor& factor,
    const std::optional<Tensor>& bias, int64_t num_out, int64_t cout, int64_t cin,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, bool relu) {
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "the input must be float32");
  STD_TORCH_CHECK(
      quant_min <= zero_point && zero_point <= quant_max && quant_max - quant_min <= 255, "the grid has more than 256 steps");
  const BlockConvolution conv(input, num_out, cout, cin, kernel_size, stride, padding, dilation);
  const int64_t quads = in_quads(conv.cin), farthest = std::max(zero_point - quant_min, quant_max - zero_point);
  STD_TORCH_CHECK(
      conv.channels * conv.positions() * farthest * 128 < (int64_t(1) << 31), "sums might not fit into 32 bits");
  const PackedBlocks packed(input, conv, blocks, places, starts, ScalarType::Char, conv.panels * kPanel * quads);
  packed.check_places(conv);
  check_parameters("scale", scale, input, 1, ScalarType::Float);
  check_parameters("factor", factor, input, num_out, ScalarType::Float);
  if (bias.has_value()) check_parameters("bias", *bias, input, num_out, ScalarType::Float);
  const Tensor x = torch::stable::contiguous(input), factors = torch::stable::contiguous(factor);
  std::optional<Tensor> biases;
  if (bias.has_value()) biases = torch::stable::contiguous(*bias);
  Tensor output = conv.empty_output(input);
  if (output.numel() == 0) return output;
  const InputGrid grid{
      *static_cast<const float*>(scale.const_data_ptr()), static_cast<float>(quant_min - zero_point),
      static_cast<float>(quant_max - zero_point), quant_min - zero_point};
  const auto* added = biases.has_value() ? static_cast<const float*>(biases->const_data_ptr()) : nullptr;
  const auto compute = [&](auto kernel, const int32_t* start) {
    using Kernel = decltype(kernel);
    using In = typename Kernel::In;
    const Tensor integers = quantized<Kernel>(x, conv, grid);
    const int64_t row = conv.over_channels * quads;
    const std::vector<In> padded(row, Kernel::padding(grid));
    const Constants constants{static_cast<const float*>(factors.const_data_ptr()), added, start};
    BlockSum<Kernel>(
        conv, static_cast<const In*>(integers.const_data_ptr()), row, quads, padded.data(), packed, constants, relu,
        static_cast<float*>(output.mutable_data_ptr()))
        .run();
  };
#if FXSLIM_X86
  const InstructionSet chosen = instruction_set();
  if (chosen == InstructionSet::avx512vnni || chosen == InstructionSet::avx2) {
    const OfBytes weights(conv, packed, grid);
    const bool in_16_bits = weights.most * (quant_max - quant_min) <= std::numeric_limits<int16_t>::max();
    if (chosen == InstructionSet::avx512vnni) compute(Avx512Vnni(), weights.starts.data());
    else if (in_16_bits) compute(Avx2Bytes(), weights.starts.data());
    else compute(Avx2(), nullptr);
  } else if (chosen == InstructionSet::avx512) {
    compute(Avx512(), nullptr);
  } else
#endif
    compute(Portable(), nullptr);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) {
  m.impl("block_sparse_conv2d_int8", TORCH_BOX(&block_sparse_conv2d_int8));
}

}  // namespace fxslim
