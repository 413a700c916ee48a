// block_mask on the CPU: columns are added up over a block's filters, then over its channels.
#include <cmath>
#include <limits>

#include "../blocks.h"
#include "instruction_set.h"
#include "numbers.h"

namespace fxslim {
namespace {

// Columns added up at once: their sums stay in the first-level cache.
constexpr int64_t kColumns = 512;
// Filters added in one pass over these sums.
constexpr int64_t kFilters = 4;

template <class M>
FXSLIM_INLINE inline double magnitude(M x) {
  return std::abs(static_cast<double>(x));
}

template <int Fixed, class M>
FXSLIM_INLINE inline void add_rows(const M* const* rows, double* __restrict sums, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    double sum = sums[j];
    for (int k = 0; k < Fixed; ++k) sum += magnitude(rows[k][j]);
    sums[j] = sum;
  }
}

// sums[j] = |column j| over the filters, from the first to the last whatever their number is.
template <class T>
void sum_columns(const T* weight, int64_t filters, int64_t row, double* sums, int64_t n) {
  using M = math_t<T>;
  M buffer[kFilters * kColumns];
  std::fill_n(sums, n, 0.0);
  for (int64_t o = 0; o < filters; o += kFilters) {
    const int64_t count = std::min(kFilters, filters - o);
    const M* rows[kFilters];
    for (int64_t k = 0; k < count; ++k) rows[k] = load_block(weight + (o + k) * row, buffer + k * kColumns, n);
    for_best_cpu([=]() FXSLIM_INLINE {
      if (count == kFilters) return add_rows<kFilters>(rows, sums, n);
      for (int64_t k = 0; k < count; ++k) add_rows<1>(rows + k, sums, n);
    });
  }
}

// Adds column sums to the sums per (block of channels, position); columns [begin, begin + n) of a row.
void add_to_blocks(const Blocks& blocks, const double* columns, int64_t begin, int64_t n, double* sums) {
  const int64_t positions = blocks.positions;
  if (blocks.channels_last || positions == 1) {
    int64_t c = begin % blocks.channels, p = begin / blocks.channels, block = c / blocks.cin;
    for (int64_t j = 0; j < n;) {
      const int64_t end = std::min(blocks.channels, (block + 1) * blocks.cin), last = std::min(n, j + end - c);
      double& to = sums[block * positions + p];
      double sum = to;
      for (c += last - j; j < last; ++j) sum += columns[j];
      to = sum;
      if (c < end) return;
      ++block;
      if (c == blocks.channels) c = block = 0, ++p;
    }
    return;
  }
  int64_t c = begin / positions, p = begin % positions;
  for (int64_t j = 0; j < n;) {
    double* to = sums + c / blocks.cin * positions;
    const int64_t last = std::min(n, j + positions - p);
    for (; j < last; ++j) to[p++] += columns[j];
    ++c;
    p = 0;
  }
}

template <class T>
std::vector<double> sum_blocks(const T* weight, const Blocks& blocks) {
  std::vector<double> sums(blocks.num_sums());
  const int64_t per_group = blocks.over_channels() * blocks.positions, row = blocks.row();
  const int64_t grain = std::max<int64_t>(1, 32768 / (blocks.cout * row));
  torch::stable::parallel_for(0, blocks.over_filters(), grain, [&](int64_t first, int64_t last) {
    double columns[kColumns];
    for (int64_t g = first; g < last; ++g) {
      const int64_t filters = std::min(blocks.cout, blocks.filters - g * blocks.cout);
      for (int64_t begin = 0; begin < row; begin += kColumns) {
        const int64_t n = std::min(kColumns, row - begin);
        sum_columns(weight + g * blocks.cout * row + begin, filters, row, columns, n);
        add_to_blocks(blocks, columns, begin, n, &sums[g * per_group]);
      }
    }
  });
  return sums;
}

// Integers that order like the mean magnitudes, NaN above infinity.
std::vector<int64_t> mean_keys(const std::vector<double>& sums, const Blocks& blocks) {
  std::vector<int64_t> keys;
  keys.reserve(blocks.count());
  const int64_t terms = blocks.per_position ? 1 : blocks.positions;
  const double* sum = sums.data();
  for (int64_t g = 0; g < blocks.over_filters(); ++g)
    for (int64_t i = 0; i < blocks.over_channels(); ++i) {
      const int64_t filters = std::min(blocks.cout, blocks.filters - g * blocks.cout);
      const int64_t channels = std::min(blocks.cin, blocks.channels - i * blocks.cin);
      const double elements = static_cast<double>(filters * channels * terms);
      for (int64_t p = 0; p < blocks.positions; p += terms) {
        double total = 0;
        for (int64_t k = 0; k < terms; ++k) total += *sum++;
        const double mean = total / elements;
        int64_t key;
        std::memcpy(&key, &mean, 8);
        keys.push_back(mean != mean ? std::numeric_limits<int64_t>::max() : key);
      }
    }
  return keys;
}

// 0 for the num_removed lowest keys, of equal ones for the first; 1 for the others.
std::vector<uint8_t> keep_highest(const std::vector<int64_t>& keys, int64_t num_removed) {
  std::vector<uint8_t> kept(keys.size(), 1);
  if (num_removed == 0) return kept;
  std::vector<int64_t> sorted = keys;
  std::nth_element(sorted.begin(), sorted.begin() + (num_removed - 1), sorted.end());
  const int64_t highest = sorted[num_removed - 1];
  int64_t of_highest = num_removed;
  for (const int64_t key : keys) of_highest -= key < highest;
  for (size_t b = 0; b < keys.size(); ++b) {
    const bool last = keys[b] == highest && of_highest > 0;
    of_highest -= last;
    kept[b] = keys[b] >= highest && !last;
  }
  return kept;
}

// What one filter keeps; `kept` has an entry per block of channels and, if blocks are so cut, position.
void fill_row(const Blocks& blocks, const uint8_t* kept, uint8_t* row) {
  const int64_t step = blocks.per_position ? blocks.positions : 1;
  const auto of = [&](int64_t block, int64_t p) { return kept[block * step + (blocks.per_position ? p : 0)]; };
  for (int64_t i = 0; i < blocks.over_channels(); ++i) {
    const int64_t first = i * blocks.cin, channels = std::min(blocks.cin, blocks.channels - first);
    if (blocks.channels_last || blocks.positions == 1) {
      for (int64_t p = 0; p < blocks.positions; ++p)
        std::memset(row + p * blocks.channels + first, of(i, p), channels);
      continue;
    }
    uint8_t* to = row + first * blocks.positions;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < blocks.positions; ++p) *to++ = of(i, p);
  }
}

void fill_mask(const Blocks& blocks, const std::vector<uint8_t>& kept, uint8_t* mask) {
  const int64_t per_group = blocks.count() / blocks.over_filters(), row = blocks.row();
  const int64_t grain = std::max<int64_t>(1, 131072 / (blocks.cout * row));
  torch::stable::parallel_for(0, blocks.over_filters(), grain, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      uint8_t* filter = mask + g * blocks.cout * row;
      fill_row(blocks, &kept[g * per_group], filter);
      const int64_t filters = std::min(blocks.cout, blocks.filters - g * blocks.cout);
      for (int64_t o = 1; o < filters; ++o) std::memcpy(filter + o * row, filter, row);
    }
  });
}

Tensor block_mask(
    const Tensor& weight, int64_t num_removed, int64_t cin, int64_t cout, bool per_position, bool channels_last) {
  const Blocks blocks(weight, cin, cout, per_position, channels_last);
  const Tensor input = in_order(weight, channels_last);
  Tensor mask = empty_in_order(weight, ScalarType::Bool, channels_last);
  if (weight.numel() == 0) return mask;
  blocks.check_removed(num_removed);
  const void* from = input.const_data_ptr();
  std::vector<double> sums;
  for_float_type(weight.scalar_type(), [&](auto zero) {
    sums = sum_blocks(static_cast<const decltype(zero)*>(from), blocks);
  });
  const std::vector<uint8_t> kept = keep_highest(mean_keys(sums, blocks), num_removed);
  fill_mask(blocks, kept, static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("block_mask", TORCH_BOX(&block_mask)); }

}  // namespace fxslim
