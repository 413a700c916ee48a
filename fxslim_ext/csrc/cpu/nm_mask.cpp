// nm_mask on the CPU: magnitudes are compared as integers, all pairs of a group at once.
#include <algorithm>
#include <numeric>

#include "../layout.h"
#include "instruction_set.h"
#include "numbers.h"

namespace fxslim {
namespace {

// Groups handled at once: one vector lane each.
constexpr int64_t kLanes = 256;
constexpr int64_t kMaxPairwise = 32;

// keys[j * kLanes + g] is member j of group g; kept[j * kLanes + g] becomes 0 or 1.
template <int Fixed, class Key>
FXSLIM_INLINE inline void rank_groups(
    const Key* __restrict keys, uint8_t* __restrict kept, int64_t groups, int n, int m_) {
  const int m = Fixed > 0 ? Fixed : m_;
  for (int j = 0; j < m; ++j) {
    Key rank[kLanes];
    const Key* mine = keys + j * kLanes;
    for (int64_t g = 0; g < groups; ++g) rank[g] = 0;
    for (int i = 0; i < m; ++i) {
      const Key* other = keys + i * kLanes;
      if (i < j)
        for (int64_t g = 0; g < groups; ++g) rank[g] += other[g] >= mine[g];
      else if (i > j)
        for (int64_t g = 0; g < groups; ++g) rank[g] += other[g] > mine[g];
    }
    for (int64_t g = 0; g < groups; ++g) kept[j * kLanes + g] = rank[g] < n;
  }
}

template <class Key>
void rank_any(const Key* keys, uint8_t* kept, int64_t groups, int64_t n, int64_t m) {
  const int few = static_cast<int>(n), many = static_cast<int>(m);
  for_best_cpu([&]() FXSLIM_INLINE {
    switch (many) {
      case 2: return rank_groups<2>(keys, kept, groups, few, many);
      case 4: return rank_groups<4>(keys, kept, groups, few, many);
      case 8: return rank_groups<8>(keys, kept, groups, few, many);
      default: return rank_groups<0>(keys, kept, groups, few, many);
    }
  });
}

// Neighbouring members (inner = 1): a transposition into lanes, and back.
template <int Fixed, class Key>
FXSLIM_INLINE inline void gather(const Key* __restrict w, Key* __restrict keys, int64_t groups, int64_t m_) {
  constexpr Key magnitude = static_cast<Key>(~(Key(1) << (8 * sizeof(Key) - 1)));
  const int64_t m = Fixed > 0 ? Fixed : m_;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < m; ++j) keys[j * kLanes + g] = w[g * m + j] & magnitude;
}

template <int Fixed>
FXSLIM_INLINE inline void scatter(const uint8_t* __restrict kept, uint8_t* __restrict mask, int64_t groups, int64_t m_) {
  const int64_t m = Fixed > 0 ? Fixed : m_;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < m; ++j) mask[g * m + j] = kept[j * kLanes + g];
}

template <class Key>
void mask_neighbours(const Key* w, uint8_t* mask, int64_t groups, int64_t n, int64_t m, Key* keys, uint8_t* kept) {
  for_best_cpu([&]() FXSLIM_INLINE {
    switch (m) {
      case 2: return gather<2>(w, keys, groups, m);
      case 4: return gather<4>(w, keys, groups, m);
      case 8: return gather<8>(w, keys, groups, m);
      default: return gather<0>(w, keys, groups, m);
    }
  });
  rank_any(keys, kept, groups, n, m);
  for_best_cpu([&]() FXSLIM_INLINE {
    switch (m) {
      case 2: return scatter<2>(kept, mask, groups, m);
      case 4: return scatter<4>(kept, mask, groups, m);
      case 8: return scatter<8>(kept, mask, groups, m);
      default: return scatter<0>(kept, mask, groups, m);
    }
  });
}

// Members that lie a stride apart: `lanes` groups beside each other.
template <class Key>
void mask_columns(
    const Key* w, uint8_t* mask, int64_t lanes, int64_t stride, int64_t n, int64_t m, Key* keys, uint8_t* kept) {
  constexpr Key magnitude = static_cast<Key>(~(Key(1) << (8 * sizeof(Key) - 1)));
  for (int64_t j = 0; j < m; ++j)
    for (int64_t g = 0; g < lanes; ++g) keys[j * kLanes + g] = w[j * stride + g] & magnitude;
  rank_any(keys, kept, lanes, n, m);
  for (int64_t j = 0; j < m; ++j) std::memcpy(mask + j * stride, kept + j * kLanes, lanes);
}

// One group of any size, `stride` between its members: a selection instead of all pairs.
template <class Key>
void mask_large_group(
    const Key* w, uint8_t* mask, int64_t stride, int64_t n, int64_t m, Key* keys, std::vector<int64_t>& order) {
  constexpr Key magnitude = static_cast<Key>(~(Key(1) << (8 * sizeof(Key) - 1)));
  for (int64_t j = 0; j < m; ++j) keys[j] = w[j * stride] & magnitude;
  std::iota(order.begin(), order.begin() + m, int64_t(0));
  const auto before = [&](int64_t a, int64_t b) { return keys[a] != keys[b] ? keys[a] > keys[b] : a < b; };
  std::nth_element(order.begin(), order.begin() + (n - 1), order.begin() + m, before);
  for (int64_t k = 0; k < m; ++k) mask[order[k] * stride] = k < n;
}

template <class Key>
void mask_rows_of_large_groups(
    const Key* w, uint8_t* mask, const Walk& walk, int64_t n, int64_t m, int64_t first, int64_t last) {
  std::vector<Key> keys(m);
  std::vector<int64_t> order(m);
  for (int64_t o = first; o < last; ++o)
    for (int64_t c = 0; c < walk.channels; c += m) {
      const int64_t members = std::min(m, walk.channels - c), most = std::min(n, members);
      for (int64_t i = 0; i < walk.inner; ++i) {
        const int64_t at = (o * walk.channels + c) * walk.inner + i;
        mask_large_group(w + at, mask + at, walk.inner, most, members, keys.data(), order);
      }
    }
}

template <class Key>
void mask_rows(const Key* w, uint8_t* mask, const Walk& walk, int64_t n, int64_t m, int64_t first, int64_t last) {
  if (m > kMaxPairwise) return mask_rows_of_large_groups(w, mask, walk, n, m, first, last);
  std::vector<Key> keys(m * kLanes);
  std::vector<uint8_t> kept(m * kLanes);
  const int64_t full = walk.channels / m, tail = walk.channels % m;
  for (int64_t o = first; o < last; ++o) {
    const Key* row = w + o * walk.period();
    uint8_t* row_mask = mask + o * walk.period();
    for (int64_t group = 0; group < full + (tail > 0); ++group) {
      const int64_t members = group < full ? m : tail, most = std::min(n, members), at = group * m * walk.inner;
      if (walk.inner == 1) {
        const int64_t groups = group < full ? std::min(kLanes, full - group) : 1;
        mask_neighbours(row + at, row_mask + at, groups, most, members, keys.data(), kept.data());
        group += groups - 1;
        continue;
      }
      for (int64_t i = 0; i < walk.inner; i += kLanes)
        mask_columns(
            row + at + i, row_mask + at + i, std::min(kLanes, walk.inner - i), walk.inner, most, members, keys.data(),
            kept.data());
    }
  }
}

Tensor nm_mask(const Tensor& weight, int64_t n, int64_t m, int64_t axis, bool channels_last) {
  STD_TORCH_CHECK(1 <= n && n <= m, "n=", n, ", m=", m, ": n kept of m needs 1 <= n <= m");
  Walk walk = walk_of(weight, axis, channels_last);
  const Tensor input = in_order(weight, channels_last);
  Tensor mask = empty_in_order(weight, ScalarType::Bool, channels_last);
  if (walk.numel() == 0) return mask;
  m = std::min(m, std::max<int64_t>(walk.channels, 1));
  n = std::min(n, m);
  // A row of whole groups joins the next: longer rows fill the lanes better.
  if (walk.inner == 1 && walk.channels % m == 0) {
    const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(walk.outer, 4096 / walk.channels));
    if (walk.outer % rows == 0) walk = Walk{walk.outer / rows, walk.channels * rows, 1};
  }
  const void* from = input.const_data_ptr();
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for_float_type(weight.scalar_type(), [&](auto zero) {
    using Key =
        std::conditional_t<sizeof(zero) == 2, int16_t, std::conditional_t<sizeof(zero) == 4, int32_t, int64_t>>;
    const int64_t grain = std::max<int64_t>(1, 32768 / walk.period());
    torch::stable::parallel_for(0, walk.outer, grain, [&](int64_t first, int64_t last) {
      mask_rows(static_cast<const Key*>(from), to, walk, n, m, first, last);
    });
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("nm_mask", TORCH_BOX(&nm_mask)); }

}  // namespace fxslim
