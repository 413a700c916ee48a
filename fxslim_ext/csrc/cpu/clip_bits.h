// Masks of one bit per element: made by comparing with two bounds, and used to select gradients.
#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_set.h"
#if FXSLIM_X86
#include <immintrin.h>
#endif

namespace fxslim {

// Bounds are one pair (Spread = false) or a pair per element.
template <bool Spread, class M>
inline uint8_t bits_of(const M* x, int64_t n, const M* from, const M* to) {
  uint8_t byte = 0;
  for (int64_t k = 0; k < n; ++k) {
    const bool kept = x[k] >= from[Spread ? k : 0] && x[k] <= to[Spread ? k : 0];
    byte |= static_cast<uint8_t>(kept << k);
  }
  return byte;
}

#if FXSLIM_X86
template <bool Spread>
FXSLIM_AVX512 inline void whole_bytes_avx512(
    const float* x, int64_t bytes, const float* from, const float* to, uint8_t* bits) {
  __m512 lo = _mm512_set1_ps(*from), hi = _mm512_set1_ps(*to);
  int64_t b = 0;
  for (; b + 2 <= bytes; b += 2) {
    const __m512 v = _mm512_loadu_ps(x + b * 8);
    if (Spread) lo = _mm512_loadu_ps(from + b * 8), hi = _mm512_loadu_ps(to + b * 8);
    const __mmask16 above = _mm512_cmp_ps_mask(v, lo, _CMP_GE_OQ);
    const uint16_t word = _mm512_mask_cmp_ps_mask(above, v, hi, _CMP_LE_OQ);
    std::memcpy(bits + b, &word, 2);
  }
  for (; b < bytes; ++b) bits[b] = bits_of<Spread>(x + b * 8, 8, from + (Spread ? b * 8 : 0), to + (Spread ? b * 8 : 0));
}

template <bool Spread>
FXSLIM_AVX512 inline void whole_bytes_avx512(
    const double* x, int64_t bytes, const double* from, const double* to, uint8_t* bits) {
  __m512d lo = _mm512_set1_pd(*from), hi = _mm512_set1_pd(*to);
  for (int64_t b = 0; b < bytes; ++b) {
    const __m512d v = _mm512_loadu_pd(x + b * 8);
    if (Spread) lo = _mm512_loadu_pd(from + b * 8), hi = _mm512_loadu_pd(to + b * 8);
    const __mmask8 above = _mm512_cmp_pd_mask(v, lo, _CMP_GE_OQ);
    bits[b] = _mm512_mask_cmp_pd_mask(above, v, hi, _CMP_LE_OQ);
  }
}

template <bool Spread>
FXSLIM_AVX2 inline void whole_bytes_avx2(
    const float* x, int64_t bytes, const float* from, const float* to, uint8_t* bits) {
  __m256 lo = _mm256_set1_ps(*from), hi = _mm256_set1_ps(*to);
  for (int64_t b = 0; b < bytes; ++b) {
    const __m256 v = _mm256_loadu_ps(x + b * 8);
    if (Spread) lo = _mm256_loadu_ps(from + b * 8), hi = _mm256_loadu_ps(to + b * 8);
    const __m256 kept = _mm256_and_ps(_mm256_cmp_ps(v, lo, _CMP_GE_OQ), _mm256_cmp_ps(v, hi, _CMP_LE_OQ));
    bits[b] = static_cast<uint8_t>(_mm256_movemask_ps(kept));
  }
}
#endif

template <bool Spread, class M>
inline void whole_bytes(const M* x, int64_t bytes, const M* from, const M* to, uint8_t* bits) {
#if FXSLIM_X86
  if (instruction_set() >= InstructionSet::avx512) return whole_bytes_avx512<Spread>(x, bytes, from, to, bits);
  if constexpr (sizeof(M) == 4)
    if (instruction_set() == InstructionSet::avx2) return whole_bytes_avx2<Spread>(x, bytes, from, to, bits);
#endif
  for (int64_t b = 0; b < bytes; ++b)
    bits[b] = bits_of<Spread>(x + b * 8, 8, from + (Spread ? b * 8 : 0), to + (Spread ? b * 8 : 0));
}

template <bool Spread, class M>
inline void set_bits_from(const M* x, int64_t n, const M* from, const M* to, uint8_t* bits, int64_t at) {
  const auto bound = [](const M* bounds, int64_t k) { return bounds + (Spread ? k : 0); };
  int64_t k = 0;
  if (at % 8 != 0) {
    k = n < 8 - at % 8 ? n : 8 - at % 8;
    bits[at / 8] |= static_cast<uint8_t>(bits_of<Spread>(x, k, from, to) << (at % 8));
  }
  if (k == n) return;
  const int64_t bytes = (n - k) / 8;
  whole_bytes<Spread>(x + k, bytes, bound(from, k), bound(to, k), bits + (at + k) / 8);
  k += bytes * 8;
  if (k < n) bits[(at + k) / 8] = bits_of<Spread>(x + k, n - k, bound(from, k), bound(to, k));
}

// Sets bit at + k where from <= x[k] <= to, for k < n. Bits are written in ascending order: a byte's
// first bit overwrites it, the others are added.
template <class M>
inline void set_bits_between(const M* x, int64_t n, const M* from, const M* to, bool spread, uint8_t* bits, int64_t at) {
  if (spread) set_bits_from<true>(x, n, from, to, bits, at);
  else set_bits_from<false>(x, n, from, to, bits, at);
}

#if FXSLIM_X86
// Four vectors a turn, and plain loads: masked ones, one at a time, run at half the memory's speed.
FXSLIM_AVX512 inline int64_t select_avx512(const uint32_t* from, const uint8_t* bits, uint32_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    std::memcpy(&word, bits + i / 8, 8);
    const __m512i a = _mm512_loadu_si512(from + i), b = _mm512_loadu_si512(from + i + 16);
    const __m512i c = _mm512_loadu_si512(from + i + 32), d = _mm512_loadu_si512(from + i + 48);
    _mm512_storeu_si512(to + i, _mm512_maskz_mov_epi32(static_cast<__mmask16>(word), a));
    _mm512_storeu_si512(to + i + 16, _mm512_maskz_mov_epi32(static_cast<__mmask16>(word >> 16), b));
    _mm512_storeu_si512(to + i + 32, _mm512_maskz_mov_epi32(static_cast<__mmask16>(word >> 32), c));
    _mm512_storeu_si512(to + i + 48, _mm512_maskz_mov_epi32(static_cast<__mmask16>(word >> 48), d));
  }
  return i;
}

FXSLIM_AVX512 inline int64_t select_avx512(const uint16_t* from, const uint8_t* bits, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    std::memcpy(&word, bits + i / 8, 8);
    const __m512i a = _mm512_loadu_si512(from + i), b = _mm512_loadu_si512(from + i + 32);
    _mm512_storeu_si512(to + i, _mm512_maskz_mov_epi16(static_cast<__mmask32>(word), a));
    _mm512_storeu_si512(to + i + 32, _mm512_maskz_mov_epi16(static_cast<__mmask32>(word >> 32), b));
  }
  return i;
}

FXSLIM_AVX512 inline int64_t select_avx512(const uint64_t* from, const uint8_t* bits, uint64_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi64(bits[i / 8], from + i));
  return i;
}

FXSLIM_AVX2 inline int64_t select_avx2(const uint32_t* from, const uint8_t* bits, uint32_t* to, int64_t n) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), each), each);
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_and_si256(kept, v));
  }
  return i;
}

FXSLIM_AVX2 inline int64_t select_avx2(const uint16_t* from, const uint8_t* bits, uint16_t* to, int64_t n) {
  const __m128i each = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i kept = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(bits[i / 8]), each), each);
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_and_si128(kept, v));
  }
  return i;
}
#endif

// to[i] = from[i] where bit i is set, else 0.
template <class Word>
inline void select_by_bits(const Word* from, const uint8_t* bits, Word* to, int64_t n) {
  int64_t i = 0;
#if FXSLIM_X86
  if (instruction_set() >= InstructionSet::avx512) i = select_avx512(from, bits, to, n);
  if constexpr (sizeof(Word) <= 4)
    if (instruction_set() == InstructionSet::avx2) i = select_avx2(from, bits, to, n);
#endif
  for (; i < n; ++i) to[i] = bits[i / 8] >> (i % 8) & 1 ? from[i] : Word(0);
}

}  // namespace fxslim
