// Half and bfloat16 to float and back, a block at a time: kernels compute in float or double only.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "instruction_set.h"
#if FXSLIM_X86
#include <immintrin.h>
#endif

namespace fxslim {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Elements that one step of a kernel handles: its buffers stay in the first-level cache.
constexpr int64_t kBlock = 2048;

template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

FXSLIM_INLINE inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

FXSLIM_INLINE inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

#if FXSLIM_X86
FXSLIM_AVX2 inline void half_to_float_f16c(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

FXSLIM_AVX2 inline void float_to_half_f16c(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; ++i) to[i] = static_cast<Half>(from[i]);
}
#endif

// The values of a block as float or double: the data itself where no conversion is needed.
template <class T>
inline const math_t<T>* load_block(const T* from, math_t<T>* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, Half>) {
#if FXSLIM_X86
    if (instruction_set() != InstructionSet::portable) {
      half_to_float_f16c(from, buffer, n);
      return buffer;
    }
#endif
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(from[i]);
    return buffer;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    for_best_cpu([=]() FXSLIM_INLINE {
      for (int64_t i = 0; i < n; ++i) buffer[i] = bfloat16_to_float(bits[i]);
    });
    return buffer;
  } else {
    return from;
  }
}

// Where a kernel writes its block: the result itself, or a buffer that store_block then converts.
template <class T>
inline math_t<T>* output_block(T* to, math_t<T>* buffer) {
  if constexpr (std::is_same_v<T, math_t<T>>) return to;
  else return buffer;
}

template <class T>
inline void store_block([[maybe_unused]] const math_t<T>* buffer, [[maybe_unused]] T* to, [[maybe_unused]] int64_t n) {
  if constexpr (std::is_same_v<T, Half>) {
#if FXSLIM_X86
    if (instruction_set() != InstructionSet::portable) return float_to_half_f16c(buffer, to, n);
#endif
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Half>(buffer[i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    for_best_cpu([=]() FXSLIM_INLINE {
      for (int64_t i = 0; i < n; ++i) bits[i] = float_to_bfloat16(buffer[i]);
    });
  }
}

// Calls body(T{}) with the element type of a floating tensor.
template <class Body>
void for_float_type(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: STD_TORCH_CHECK(false, "expected a float32, float64, float16 or bfloat16 tensor");
  }
}

}  // namespace fxslim
