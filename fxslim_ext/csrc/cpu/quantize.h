// The arithmetic that every fake-quantizing kernel shares: a grid per channel, and the loop over a block.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "../float_grid.h"
#include "../grid.h"
#include "../layout.h"
#include "clip_bits.h"
#include "numbers.h"

namespace fxslim {

// Adding and subtracting 1.5 * 2^(mantissa bits - 1) rounds half to even, on any instruction set.
template <class M>
constexpr M kRounder = std::is_same_v<M, double> ? M(6755399441055744.0) : M(12582912.0);

template <class M>
FXSLIM_INLINE inline M round_half_even(M value) {
  return (value + kRounder<M>) - kRounder<M>;
}

// The grid of whole numbers: how its values are rounded, and half of the distance between two of them.
template <class M>
struct WholeGrid {
  FXSLIM_INLINE M operator()(M value) const { return round_half_even(value); }
  M half_step() const { return M(0.5); }
};

// The largest x that rounds to at most `step` steps, or (direction = -1) the smallest to at least
// `step`. Rounding is monotone, so a mask needs no quotient: it compares x with these two.
template <class M, class Rounding>
M outermost(M step, M scale, M direction, const Rounding& rounding) {
  constexpr M most = std::numeric_limits<M>::max();
  const M infinity = std::numeric_limits<M>::infinity() * direction;
  if (!(scale > 0)) return -infinity;
  const auto inside = [&](M x) { return rounding(x / scale) * direction <= step * direction; };
  M x = std::clamp((step + direction * rounding.half_step()) * scale, -most, most);
  // The start is off by an ulp or two. The bound is for subnormal numbers that the CPU was told to flush to 0.
  int tries = 64;
  while (!inside(x) && tries-- > 0) x = std::nextafter(x, -infinity);
  for (M next = std::nextafter(x, infinity); tries-- > 0 && std::isfinite(next) && inside(next);
       next = std::nextafter(x, infinity))
    x = next;
  return x;
}

// What the loop over a channel needs: scale, clipping bounds in steps from the zero point, and the
// values between which nothing is clipped. Where runs of one channel are short, the table is spread
// out to one entry per element, so that the loop stays a vector loop.
template <class M>
struct GridTable {
  Walk walk;
  bool spread = false;
  std::vector<M> scale, low, high, kept_from, kept_to;

  // Empty: to be filled.
  explicit GridTable(const Walk& walk_) : walk(walk_) {}

  GridTable(
      const Walk& walk_, const M* scale_, const int32_t* zero_point, int64_t quant_min, int64_t quant_max,
      bool with_mask)
      : walk(walk_) {
    fill_whole(scale_, zero_point, quant_min, quant_max, with_mask);
  }

  GridTable(const Walk& walk_, const M* scale_, const FloatGrid<M>& grid, bool with_mask) : walk(walk_) {
    fill(scale_, with_mask, grid, [=](int64_t) { return std::pair(-grid.largest, grid.largest); });
  }

  void fill_whole(
      const M* scale_, const int32_t* zero_point, int64_t quant_min, int64_t quant_max, bool with_mask) {
    fill(scale_, with_mask, WholeGrid<M>{}, [=](int64_t c) {
      return std::pair(static_cast<M>(quant_min - zero_point[c]), static_cast<M>(quant_max - zero_point[c]));
    });
  }

  // bounds(c) are those of a channel, in steps from the zero point.
  template <class Rounding, class Bounds>
  void fill(const M* scale_, bool with_mask, const Rounding& rounding, const Bounds& bounds) {
    const int64_t period = walk.period();
    spread = walk.channels > 1 && walk.inner < 32;
    const int64_t size = !spread ? walk.channels : period * std::max<int64_t>(1, 1024 / std::max<int64_t>(period, 1));
    for (auto* column : {&scale, &low, &high}) column->resize(size);
    if (with_mask)
      for (auto* column : {&kept_from, &kept_to}) column->resize(size);
    for (int64_t i = 0; i < size; ++i) {
      if (spread && i % walk.inner != 0) {
        copy_entry(i - 1, i, with_mask);
      } else if (spread && i >= period) {
        copy_entry(i - period, i, with_mask);
      } else {
        const int64_t c = spread ? i / walk.inner : i;
        scale[i] = usable_scale(scale_[c]);
        std::tie(low[i], high[i]) = bounds(c);
        if (!with_mask) continue;
        kept_from[i] = outermost(low[i], scale[i], M(-1), rounding);
        kept_to[i] = outermost(high[i], scale[i], M(1), rounding);
      }
    }
  }

  void copy_entry(int64_t from, int64_t to, bool with_mask) {
    for (auto* column : {&scale, &low, &high}) (*column)[to] = (*column)[from];
    if (with_mask)
      for (auto* column : {&kept_from, &kept_to}) (*column)[to] = (*column)[from];
  }

  // Calls body(first, count, table index) for each stretch of [begin, end) with one rule.
  template <class Body>
  FXSLIM_INLINE void for_stretches(int64_t begin, int64_t end, const Body& body) const {
    const int64_t table = static_cast<int64_t>(scale.size());
    for (int64_t i = begin; i < end;) {
      int64_t at, count;
      if (spread) {
        at = i % table;
        count = std::min(end - i, table - at);
      } else {
        const int64_t run = i / walk.inner;
        at = run % walk.channels;
        count = std::min(end, (run + 1) * walk.inner) - i;
      }
      body(i, count, at);
      i += count;
    }
  }
};

// y = round(clamp(x / scale, low, high)) * scale; the bounds are on the grid, so this clamps the rounded value.
template <bool Spread, class M, class Rounding>
FXSLIM_INLINE inline void quantize_run(
    const M* __restrict x, M* __restrict y, int64_t n, const M* __restrict scale, const M* __restrict low,
    const M* __restrict high, const Rounding& rounding) {
  const M scale0 = *scale, low0 = *low, high0 = *high;
  const Rounding round = rounding;
  for (int64_t i = 0; i < n; ++i) {
    const M s = Spread ? scale[i] : scale0, lo = Spread ? low[i] : low0, hi = Spread ? high[i] : high0;
    M v = x[i] / s;
    v = v < lo ? lo : v;
    v = v > hi ? hi : v;
    y[i] = round(v) * s;
  }
}

// Quantizes elements [begin, end), and packs their mask where `bits` is given (begin a multiple of 8).
template <class T, class Rounding = WholeGrid<math_t<T>>>
void quantize_range(
    const T* x, T* y, uint8_t* bits, int64_t begin, int64_t end, const GridTable<math_t<T>>& grid,
    const Rounding& rounding = {}) {
  using M = math_t<T>;
  alignas(64) M in_buffer[kBlock], out_buffer[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    const M* in = load_block(x + start, in_buffer, count);
    M* out = output_block(y + start, out_buffer);
    for_best_cpu([&]() FXSLIM_INLINE {
      grid.for_stretches(start, start + count, [&](int64_t i, int64_t n, int64_t at) FXSLIM_INLINE {
        const M *s = &grid.scale[at], *lo = &grid.low[at], *hi = &grid.high[at];
        if (grid.spread) quantize_run<true>(in + (i - start), out + (i - start), n, s, lo, hi, rounding);
        else quantize_run<false>(in + (i - start), out + (i - start), n, s, lo, hi, rounding);
      });
    });
    store_block(out, y + start, count);
    if (bits == nullptr) continue;
    uint8_t* block_bits = bits + start / 8;
    grid.for_stretches(start, start + count, [&](int64_t i, int64_t n, int64_t at) {
      set_bits_between(in + (i - start), n, &grid.kept_from[at], &grid.kept_to[at], grid.spread, block_bits, i - start);
    });
  }
}

// Elements that make a parallel task worth its start.
constexpr int64_t kGrain = 16 * kBlock;

// Quantizes the whole tensor on all threads, and packs its clip mask where one is wanted.
template <class T, class Rounding = WholeGrid<math_t<T>>>
void quantize_tensor(
    const T* x, T* y, uint8_t* bits, const GridTable<math_t<T>>& grid, const Rounding& rounding = {}) {
  const int64_t numel = grid.walk.numel();
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kGrain / kBlock, [&](int64_t first, int64_t last) {
    quantize_range(x, y, bits, first * kBlock, std::min(numel, last * kBlock), grid, rounding);
  });
}

}  // namespace fxslim
