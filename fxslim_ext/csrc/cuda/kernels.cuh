// What the CUDA kernels share: types, launches, the index of a channel, sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "../grid.h"
#include "../layout.h"

namespace fxslim {

constexpr int kThreads = 256;

template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Not STD_CUDA_KERNEL_LAUNCH_CHECK: its symbols differ between torch versions.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel of fxslim could not be launched: ", cudaGetErrorString(error));
}

inline unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > (1 << 20) ? (1 << 20) : blocks);
}

// Calls body(T{}) with the CUDA type of a floating tensor.
template <class Body>
void for_float_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(__half{});
    case ScalarType::BFloat16: return body(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "expected a float32, float64, float16 or bfloat16 tensor");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* output(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

struct ChannelOf {
  int64_t inner, channels;
  explicit ChannelOf(const Walk& walk) : inner(walk.inner), channels(walk.channels) {}
  __device__ int64_t operator()(int64_t i) const { return channels == 1 ? 0 : i / inner % channels; }
};

// Clamps to whole bounds before rounding, which gives the clamped rounded value.
template <class M>
__device__ M steps_of(M x, M scale, M low, M high) {
  M v = x / scale;
  v = v < low ? low : v;
  v = v > high ? high : v;
  return std::nearbyint(v) + M(0);
}

// y and the clip mask: a thread makes one byte of the mask.
template <class T>
__global__ void quantize_kernel(
    const T* x, T* y, uint8_t* mask, int64_t numel, ChannelOf channel_of, const math_t<T>* scales,
    const int32_t* zero_points, int quant_min, int quant_max) {
  using M = math_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < numel; i += step) {
    unsigned byte = 0;
    for (int k = 0; k < 8 && i + k < numel; ++k) {
      const int64_t c = channel_of(i + k);
      const M scale = usable_scale(scales[c]);
      const M low = static_cast<M>(quant_min - zero_points[c]), high = static_cast<M>(quant_max - zero_points[c]);
      const M value = static_cast<M>(x[i + k]);
      y[i + k] = static_cast<T>(steps_of(value, scale, low, high) * scale);
      const M rounded = std::nearbyint(value / scale);
      byte |= (rounded >= low && rounded <= high ? 1u : 0u) << k;
    }
    if (mask != nullptr) mask[i / 8] = static_cast<uint8_t>(byte);
  }
}

template <class T>
void launch_quantize(
    const Tensor& x, Tensor& y, Tensor* mask, const Walk& walk, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max) {
  if (walk.numel() == 0) return;
  quantize_kernel<T><<<blocks_for(mask_bytes(walk.numel())), kThreads, 0, current_stream(x)>>>(
      data<T>(x), output<T>(y), mask == nullptr ? nullptr : output<uint8_t>(*mask), walk.numel(), ChannelOf(walk),
      data<math_t<T>>(scale), data<int32_t>(zero_point), static_cast<int>(quant_min), static_cast<int>(quant_max));
  check_launch();
}

// A channel's elements, cut into slices: one block (channel, slice) each. Sums are made in a fixed
// order, so that equal inputs give equal results.
struct Slices {
  Walk walk;
  int64_t per_channel, count, length;

  explicit Slices(const Walk& walk_) : walk(walk_), per_channel(walk_.outer * walk_.inner) {
    const int64_t wanted = (per_channel + kThreads * 32 - 1) / (kThreads * 32);
    count = wanted < 1 ? 1 : wanted > 1024 ? 1024 : wanted;
    length = (per_channel + count - 1) / count;
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(walk.channels), static_cast<unsigned>(count)); }
  __device__ int64_t begin() const { return blockIdx.y * length; }
  __device__ int64_t end() const { return begin() + length < per_channel ? begin() + length : per_channel; }
  __device__ int64_t element(int64_t k) const {
    return (k / walk.inner * walk.channels + blockIdx.x) * walk.inner + k % walk.inner;
  }
  __device__ int64_t partial() const { return static_cast<int64_t>(blockIdx.x) * count + blockIdx.y; }
};

// The block's threads' values combined; the result is valid in thread 0.
template <class Value, class Combine>
__device__ Value combine_block(Value value, const Combine& combine) {
  // Bytes, since a shared variable can't have a constructor.
  __shared__ alignas(16) unsigned char bytes[kThreads * sizeof(Value)];
  Value* shared = reinterpret_cast<Value*>(bytes);
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  return shared[0];
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// result[c] = factor * the sum of channel c's partial sums.
template <class M>
__global__ void sum_partials_kernel(const double* partial, int64_t count, double factor, M* result) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partial[blockIdx.x * count + k];
  sum = combine_block(sum, Add{});
  if (threadIdx.x == 0) result[blockIdx.x] = static_cast<M>(sum * factor);
}

}  // namespace fxslim
