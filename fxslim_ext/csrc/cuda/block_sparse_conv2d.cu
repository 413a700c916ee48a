// block_sparse_conv2d on CUDA, in bfloat16 and float16: a block of threads makes 64 pixels of up to 64 filters.
//
// A turn brings 32 channels of a stored block, and what the pixels read there, into shared memory; tensor cores add up
// in float32. Bfloat16 has none before sm_80: there plain code does the same.
#include <mma.h>

#include <limits>

#include "../block_sparse.h"
#include "kernels.cuh"

namespace fxslim {
namespace {

constexpr int kWarps = 4, kPixels = 64, kFilters = 64, kDepth = 32, kFragment = 16;
constexpr int kPanels = kFilters / kPanel, kBlockThreads = kWarps * 32;
// Rows are longer than what they hold: threads meet fewer of their neighbours' memory banks.
constexpr int kInputStep = kDepth + 8, kSumStep = kFilters + 4;
static_assert(kPixels == kWarps * kFragment && kPanel == kFragment && kBlockThreads == kPanels * kDepth);

// Plain numbers of a BlockConvolution, and where its values lie.
template <class T>
struct Task {
  int64_t height, width, channels, num_out, cout, cin, panels, over_channels, positions, kernel_w;
  int64_t stride_h, stride_w, top, left, dilation_h, dilation_w, out_h, out_w, pixels, count, chunks, parts;
  const T *input, *blocks, *bias;
  const int32_t *places, *starts;
  T* output;
  bool relu, wide;  // wide: 16 bytes can be read at once
};

// Sums of a warp's 16 pixels.
template <class T>
struct WarpSums {
  template <class Use, class Order>
  using Fragment = nvcuda::wmma::fragment<Use, kFragment, kFragment, kFragment, T, Order>;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kFragment, kFragment, kFragment, float> sums[kPanels];

  __device__ WarpSums() {
    for (auto& sum : sums) nvcuda::wmma::fill_fragment(sum, 0.0f);
  }
  __device__ void add(const T* input, const T* weights) {
    for (int k = 0; k < kDepth; k += kFragment) {
      Fragment<nvcuda::wmma::matrix_a, nvcuda::wmma::row_major> a;
      nvcuda::wmma::load_matrix_sync(a, input + k, kInputStep);
      for (int p = 0; p < kPanels; ++p) {
        Fragment<nvcuda::wmma::matrix_b, nvcuda::wmma::row_major> b;
        nvcuda::wmma::load_matrix_sync(b, weights + (p * kDepth + k) * kPanel, kPanel);
        nvcuda::wmma::mma_sync(sums[p], a, b, sums[p]);
      }
    }
  }
  __device__ void store(float* to) const {
    for (int p = 0; p < kPanels; ++p)
      nvcuda::wmma::store_matrix_sync(to + p * kPanel, sums[p], kSumStep, nvcuda::wmma::mem_row_major);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <>
struct WarpSums<__nv_bfloat16> {
  static constexpr int kOwn = kFragment * kFilters / 32;
  float sums[kOwn] = {};

  static __device__ int pixel(int i) { return (i * 32 + threadIdx.x % 32) / kFilters; }
  static __device__ int filter(int i) { return (i * 32 + threadIdx.x % 32) % kFilters; }
  __device__ void add(const __nv_bfloat16* input, const __nv_bfloat16* weights) {
    for (int i = 0; i < kOwn; ++i)
      for (int k = 0; k < kDepth; ++k)
        sums[i] += __bfloat162float(input[pixel(i) * kInputStep + k]) *
                   __bfloat162float(weights[(filter(i) / kPanel * kDepth + k) * kPanel + filter(i) % kPanel]);
  }
  __device__ void store(float* to) const {
    for (int i = 0; i < kOwn; ++i) to[pixel(i) * kSumStep + filter(i)] = sums[i];
  }
};
#endif

// to[i] = from[i] for the first `count` of `Size`, 0 for the rest.
template <int Size, class T>
__device__ void copy_filled(const T* from, T* to, int64_t count, bool wide) {
  if (wide && count >= Size) {
    for (int i = 0; i < Size; i += 8) *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    return;
  }
  for (int i = 0; i < Size; ++i) to[i] = i < count ? from[i] : static_cast<T>(0.0f);
}

// The pixel whose input a thread brings: two threads bring one.
struct Pixel {
  int64_t image, y, x;
  bool exists;

  template <class T>
  __device__ Pixel(const Task<T>& t, int64_t p) : exists(p < t.pixels) {
    image = p / (t.out_w * t.out_h);
    y = p / t.out_w % t.out_h * t.stride_h - t.top;
    x = p % t.out_w * t.stride_w - t.left;
  }
  // Its row at a position of the kernel; null in the padding.
  template <class T>
  __device__ const T* row(const Task<T>& t, int64_t position) const {
    const int64_t yi = y + position / t.kernel_w * t.dilation_h, xi = x + position % t.kernel_w * t.dilation_w;
    if (!exists || yi < 0 || yi >= t.height || xi < 0 || xi >= t.width) return nullptr;
    return t.input + ((image * t.height + yi) * t.width + xi) * t.channels;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads) block_sparse_conv2d_kernel(const Task<T> t) {
  __shared__ alignas(32) unsigned char input_bytes[kPixels * kInputStep * sizeof(T)];
  __shared__ alignas(32) unsigned char weight_bytes[kFilters * kDepth * sizeof(T)];
  __shared__ alignas(32) float sums[kPixels * kSumStep];
  T *const inputs = reinterpret_cast<T*>(input_bytes), *const weights = reinterpret_cast<T*>(weight_bytes);
  const int64_t tile = blockIdx.x / t.parts, part = blockIdx.x % t.parts;
  const int64_t g = part / t.chunks, chunk = part % t.chunks;
  const int thread = threadIdx.x, warp = thread / 32, half = thread % 2 * (kDepth / 2);
  const int64_t panel = chunk * kPanels + thread / kDepth, depth_row = thread % kDepth;
  const Pixel pixel(t, tile * kPixels + thread / 2);
  const int64_t begin = t.starts[g], end = t.starts[g + 1];
  // Nobody looked at these numbers before: blocks that the weight does not have make NaN.
  bool right = 0 <= begin && begin <= end && end <= t.count;
  WarpSums<T> own;
  for (int64_t b = begin; right && b < end; ++b) {
    const int64_t i = t.places[2 * b], position = t.places[2 * b + 1];
    right = 0 <= i && i < t.over_channels && 0 <= position && position < t.positions;
    if (!right) break;
    const int64_t first = i * t.cin, depth = min(t.cin, t.channels - first);
    const T* const row = pixel.row(t, position);
    for (int64_t k = 0; k < depth; k += kDepth) {
      copy_filled<kDepth / 2>(
          row + first + k + half, inputs + thread / 2 * kInputStep + half, row == nullptr ? 0 : depth - k - half, t.wide);
      const bool stored = panel < t.panels && k + depth_row < depth;
      copy_filled<kPanel>(
          t.blocks + ((b * t.panels + panel) * t.cin + k + depth_row) * kPanel, weights + thread * kPanel,
          stored ? kPanel : 0, t.wide);
      __syncthreads();
      own.add(inputs + warp * kFragment * kInputStep, weights);
      __syncthreads();
    }
  }
  own.store(sums + warp * kFragment * kSumStep);
  __syncthreads();
  const int64_t filters = min(t.cout, t.num_out - g * t.cout) - chunk * kFilters;
  for (int i = thread; i < kPixels * kFilters; i += kBlockThreads) {
    const int64_t p = tile * kPixels + i / kFilters, o = i % kFilters;
    if (p >= t.pixels || o >= filters) continue;
    const int64_t filter = g * t.cout + chunk * kFilters + o;
    float value = sums[i / kFilters * kSumStep + o];
    if (t.bias != nullptr) value += static_cast<float>(t.bias[filter]);
    if (t.relu && value < 0.0f) value = 0.0f;
    t.output[p * t.num_out + filter] = static_cast<T>(right ? value : std::numeric_limits<float>::quiet_NaN());
  }
}

bool lies_wide(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

template <class T>
void launch(
    const BlockConvolution& conv, const Tensor& input, const PackedBlocks& packed, const std::optional<Tensor>& bias,
    int64_t cin, bool relu, Tensor& result) {
  const int64_t chunks = (conv.panels + kPanels - 1) / kPanels, parts = chunks * conv.over_filters;
  const int64_t blocks = (conv.pixels() + kPixels - 1) / kPixels * parts;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "an output of this size has more tiles than a launch of CUDA");
  const T *x = data<T>(input), *w = data<T>(packed.blocks);
  const Task<T> task{
      conv.height, conv.width, conv.channels, conv.num_out, conv.cout, cin, conv.panels, conv.over_channels,
      conv.positions(), conv.kernel_w, conv.stride_h, conv.stride_w, conv.top, conv.left, conv.dilation_h,
      conv.dilation_w, conv.out_h, conv.out_w, conv.pixels(), packed.places.numel() / 2, chunks, parts, x, w,
      bias.has_value() ? data<T>(*bias) : nullptr, data<int32_t>(packed.places), data<int32_t>(packed.starts),
      output<T>(result), relu, conv.channels % 8 == 0 && cin % 8 == 0 && lies_wide(x) && lies_wide(w)};
  block_sparse_conv2d_kernel<T><<<static_cast<unsigned>(blocks), kBlockThreads, 0, current_stream(input)>>>(task);
  check_launch();
}

Tensor block_sparse_conv2d(
    const Tensor& input, const Tensor& blocks, const Tensor& places, const Tensor& starts,
    const std::optional<Tensor>& bias, int64_t num_out, int64_t cout, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    bool relu) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "the input must be bfloat16 or float16 on CUDA");
  STD_TORCH_CHECK(blocks.dim() == 4, "blocks have ", blocks.dim(), " dims, not 4");
  const int64_t cin = blocks.size(2);
  const BlockConvolution conv(input, num_out, cout, cin, kernel_size, stride, padding, dilation);
  const PackedBlocks packed(input, conv, blocks, places, starts, dtype, conv.panels * kPanel * cin);
  std::optional<Tensor> biases;
  if (bias.has_value()) {
    check_parameters("bias", *bias, input, num_out, dtype);
    biases = torch::stable::contiguous(*bias);
  }
  const Tensor x = torch::stable::contiguous(input);
  Tensor result = conv.empty_output(input);
  if (result.numel() == 0) return result;
  if (dtype == ScalarType::Half) launch<__half>(conv, x, packed, biases, cin, relu, result);
  else launch<__nv_bfloat16>(conv, x, packed, biases, cin, relu, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) { m.impl("block_sparse_conv2d", TORCH_BOX(&block_sparse_conv2d)); }

}  // namespace fxslim
