// Small floating-point formats: rounding that CPU and CUDA kernels share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "grid.h"

namespace fxslim {

// The values of a format with few mantissa bits; ties go to the even mantissa, subnormals are values like any other.
template <class M>
struct FloatGrid {
  M rounder, least, largest;

  FloatGrid(int64_t mantissa_bits, int64_t least_exponent, double largest_)
      : rounder(std::ldexp(M(1.5), kBits - static_cast<int>(mantissa_bits))),
        least(std::ldexp(M(1), static_cast<int>(least_exponent))),
        largest(static_cast<M>(largest_)) {}

  // The nearest value, were there no largest one; NaN for infinities and numbers near them. The power of two below
  // v is v's exponent bits alone. Adding and subtracting 1.5 * 2^(bits of M - mantissa bits) of it rounds half to even.
  FXSLIM_BOTH M operator()(M v) const {
    Word bits;
    std::memcpy(&bits, &v, sizeof(M));
    bits &= kExponent;
    M power;
    std::memcpy(&power, &bits, sizeof(M));
    power = power < least ? least : power;
    const M magic = power * rounder;
    return (v + magic) - magic;
  }

  // Half of the distance from the largest value to the next one that more exponents would give.
  M half_step() const {
    return std::ldexp(rounder / 3, std::ilogb(largest) - kBits);
  }

 private:
  using Word = std::conditional_t<sizeof(M) == 8, uint64_t, uint32_t>;
  static constexpr int kBits = sizeof(M) == 8 ? 52 : 23;
  static constexpr Word kExponent = static_cast<Word>(sizeof(M) == 8 ? 0x7ff0000000000000 : 0x7f800000);
};

}  // namespace fxslim
