// block_mask on CUDA: a thread adds up one column over a block's filters, then one over its channels.
#include <array>
#include <limits>

#include "../blocks.h"
#include "kernels.cuh"

namespace fxslim {
namespace {

// What a kernel needs of Blocks: plain numbers.
struct Cut {
  int64_t filters, channels, positions, cout, cin, row, over_filters, over_channels;
  bool per_position, channels_last;

  explicit Cut(const Blocks& b)
      : filters(b.filters), channels(b.channels), positions(b.positions), cout(b.cout), cin(b.cin), row(b.row()),
        over_filters(b.over_filters()), over_channels(b.over_channels()), per_position(b.per_position),
        channels_last(b.channels_last) {}
  __device__ int64_t column(int64_t c, int64_t p) const { return channels_last ? p * channels + c : c * positions + p; }
  __device__ int64_t channel_of(int64_t j) const { return channels_last ? j % channels : j / positions; }
  __device__ int64_t position_of(int64_t j) const { return channels_last ? j / channels : j % positions; }
  __device__ int64_t filters_of(int64_t g) const { return min(cout, filters - g * cout); }
  __device__ int64_t channels_of(int64_t i) const { return min(cin, channels - i * cin); }
};

__device__ int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ int64_t index_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// columns[g * row + j]: column j over the filters of group g, from the first to the last.
template <class T>
__global__ void sum_columns_kernel(const T* weight, Cut cut, double* columns) {
  for (int64_t k = first_index(); k < cut.over_filters * cut.row; k += index_step()) {
    const int64_t g = k / cut.row, j = k % cut.row;
    const T* from = weight + g * cut.cout * cut.row + j;
    double sum = 0;
    for (int64_t o = 0; o < cut.filters_of(g); ++o) {
      const math_t<T> value = static_cast<math_t<T>>(from[o * cut.row]);
      sum += fabs(static_cast<double>(value));
    }
    columns[k] = sum;
  }
}

// means[b], in the order (block of filters, block of channels, position): channels added up, then positions.
__global__ void mean_kernel(const double* columns, Cut cut, double* means, int64_t count) {
  const int64_t kept_positions = cut.per_position ? cut.positions : 1, terms = cut.per_position ? 1 : cut.positions;
  for (int64_t b = first_index(); b < count; b += index_step()) {
    const int64_t pair = b / kept_positions, g = pair / cut.over_channels, i = pair % cut.over_channels;
    const double* row = columns + g * cut.row;
    double total = 0;
    for (int64_t k = 0; k < terms; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < cut.channels_of(i); ++c) sum += row[cut.column(i * cut.cin + c, b % kept_positions + k)];
      total += sum;
    }
    const double mean = total / static_cast<double>(cut.filters_of(g) * cut.channels_of(i) * terms);
    // Radix sort orders bits: one NaN stands for all.
    means[b] = mean == mean ? mean : std::numeric_limits<double>::quiet_NaN();
  }
}

__global__ void keep_kernel(const int64_t* ascending, bool* kept, int64_t num_removed, int64_t count) {
  for (int64_t k = first_index(); k < count; k += index_step()) kept[ascending[k]] = k >= num_removed;
}

__global__ void fill_kernel(const bool* kept, Cut cut, bool* mask) {
  for (int64_t k = first_index(); k < cut.filters * cut.row; k += index_step()) {
    const int64_t g = k / cut.row / cut.cout, j = k % cut.row, i = cut.channel_of(j) / cut.cin;
    const int64_t block = g * cut.over_channels + i;
    mask[k] = kept[cut.per_position ? block * cut.positions + cut.position_of(j) : block];
  }
}

// Indices from the smallest on, NaN last, equal ones in their order. Headers of torch 2.11 have no sort.
Tensor ascending_order(const Tensor& values) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(values), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

Tensor block_mask(
    const Tensor& weight, int64_t num_removed, int64_t cin, int64_t cout, bool per_position, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Blocks blocks(weight, cin, cout, per_position, channels_last);
  const Tensor input = in_order(weight, channels_last);
  Tensor mask = empty_in_order(weight, ScalarType::Bool, channels_last);
  if (weight.numel() == 0) return mask;
  blocks.check_removed(num_removed);
  const Cut cut(blocks);
  const cudaStream_t stream = current_stream(weight);
  Tensor columns = empty_vector(weight, cut.over_filters * cut.row, ScalarType::Double);
  for_float_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    sum_columns_kernel<T>
        <<<blocks_for(columns.numel()), kThreads, 0, stream>>>(data<T>(input), cut, output<double>(columns));
    check_launch();
  });
  const int64_t count = blocks.count();
  Tensor means = empty_vector(weight, count, ScalarType::Double);
  mean_kernel<<<blocks_for(count), kThreads, 0, stream>>>(data<double>(columns), cut, output<double>(means), count);
  check_launch();
  const Tensor order = ascending_order(means);
  Tensor kept = empty_vector(weight, count, ScalarType::Bool);
  keep_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
      data<int64_t>(order), output<bool>(kept), num_removed, count);
  check_launch();
  fill_kernel<<<blocks_for(weight.numel()), kThreads, 0, stream>>>(data<bool>(kept), cut, output<bool>(mask));
  check_launch();
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) { m.impl("block_mask", TORCH_BOX(&block_mask)); }

}  // namespace fxslim
