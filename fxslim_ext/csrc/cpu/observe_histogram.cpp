// observe_histogram on the CPU.
#include <mutex>

#include "../bins.h"
#include "ranges.h"

namespace fxslim {
namespace {

// Neighbours are often equal (zeros after a ReLU): counted in one table, each would wait for the one before.
constexpr int64_t kTables = 4;

// Counts of one thread: kTables tables, the last entry of each for NaN.
struct Tables {
  int64_t size;
  std::vector<uint32_t> counts;
  explicit Tables(int64_t bins) : size(bins + 1), counts(kTables * size) {}

  void add(const int32_t* __restrict index, int64_t n) {
    uint32_t* table[kTables];
    for (int64_t t = 0; t < kTables; ++t) table[t] = counts.data() + t * size;
    int64_t i = 0;
    for (; i + kTables <= n; i += kTables) {
      ++table[0][index[i]];
      ++table[1][index[i + 1]];
      ++table[2][index[i + 2]];
      ++table[3][index[i + 3]];
    }
    for (; i < n; ++i) ++table[0][index[i]];
  }

  void flush_into(int64_t* result) {
    for (int64_t t = 0; t < kTables; ++t)
      for (int64_t k = 0; k + 1 < size; ++k) result[k] += counts[t * size + k];
    std::fill(counts.begin(), counts.end(), 0);
  }
};

template <class M>
FXSLIM_INLINE inline void find_bins(const M* __restrict x, int64_t n, const Bins<M> bins, int32_t* __restrict index) {
  for (int64_t i = 0; i < n; ++i) index[i] = bins(x[i]);
}

template <class T>
Range<math_t<T>> count_all(const T* x, int64_t numel, const Bins<math_t<T>> bins, int64_t num_bins, int64_t* result) {
  using M = math_t<T>;
  // Counts and extrema do not depend on the order in which threads come.
  std::mutex mutex;
  M total[3] = {range_start<M>(kLow), range_start<M>(kHigh), M(0)};
  torch::stable::parallel_for(0, numel, 1 << 18, [&](int64_t first, int64_t last) {
    Tables tables(num_bins);
    M acc[3] = {range_start<M>(kLow), range_start<M>(kHigh), M(0)};
    alignas(64) M buffer[kBlock];
    alignas(64) int32_t index[kBlock];
    int64_t unflushed = 0;
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t n = std::min(kBlock, last - i);
      const M* values = load_block(x + i, buffer, n);
      for_best_cpu([&]() FXSLIM_INLINE {
        extend(values, n, acc[kLow], acc[kHigh], acc[kBad]);
        find_bins(values, n, bins, index);
      });
      if (bins.usable) tables.add(index, n);
      if ((unflushed += n) > (int64_t(1) << 31)) {
        const std::lock_guard lock(mutex);
        tables.flush_into(result);
        unflushed = 0;
      }
    }
    const std::lock_guard lock(mutex);
    tables.flush_into(result);
    total[kLow] = std::min(total[kLow], acc[kLow]);
    total[kHigh] = std::max(total[kHigh], acc[kHigh]);
    total[kBad] = std::max(total[kBad], acc[kBad]);
  });
  return range_of(total, 1);
}

std::tuple<Tensor, Tensor, Tensor> observe_histogram(
    const Tensor& x, const Tensor& low, const Tensor& high, int64_t num_bins, bool channels_last) {
  STD_TORCH_CHECK(x.numel() > 0, "x is empty: there is no smallest value");
  STD_TORCH_CHECK(1 <= num_bins && num_bins <= 65536, "bins=", num_bins, " must be in [1, 65536]");
  check_parameters("low", low, x, 1, ScalarType::Double);
  check_parameters("high", high, x, 1, ScalarType::Double);
  const Tensor input = in_order(x, channels_last);
  Tensor counts = empty_vector(x, num_bins, ScalarType::Long);
  Tensor smallest = empty_scalar(x, math_type(x)), largest = empty_scalar(x, math_type(x));
  auto* result = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::fill_n(result, num_bins, 0);
  for_float_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = math_t<T>;
    const Bins<M> bins(
        *static_cast<const double*>(low.const_data_ptr()), *static_cast<const double*>(high.const_data_ptr()), num_bins);
    const Range<M> range =
        count_all(static_cast<const T*>(input.const_data_ptr()), x.numel(), bins, num_bins, result);
    *static_cast<M*>(smallest.mutable_data_ptr()) = range.low;
    *static_cast<M*>(largest.mutable_data_ptr()) = range.high;
  });
  return {counts, smallest, largest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("observe_histogram", TORCH_BOX(&observe_histogram)); }

}  // namespace fxslim
