// nm_mask on CUDA: a thread decides one element by its rank in its group.
#include "kernels.cuh"

namespace fxslim {
namespace {

template <class Key>
__global__ void nm_mask_kernel(const Key* weight, bool* mask, Walk walk, int64_t n, int64_t m) {
  const Key magnitude = static_cast<Key>(~(Key(1) << (8 * sizeof(Key) - 1)));
  const int64_t numel = walk.outer * walk.channels * walk.inner;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += step) {
    const int64_t c = i / walk.inner % walk.channels;
    const int64_t first = c / m * m, last = first + m < walk.channels ? first + m : walk.channels;
    const int64_t base = i - c * walk.inner;
    const Key mine = weight[i] & magnitude;
    int64_t rank = 0;
    for (int64_t j = first; j < last; ++j) {
      const Key other = weight[base + j * walk.inner] & magnitude;
      rank += other > mine || (other == mine && j < c);
    }
    mask[i] = rank < n;
  }
}

Tensor nm_mask(const Tensor& weight, int64_t n, int64_t m, int64_t axis, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  STD_TORCH_CHECK(1 <= n && n <= m, "n=", n, ", m=", m, ": n kept of m needs 1 <= n <= m");
  const Walk walk = walk_of(weight, axis, channels_last);
  const Tensor input = in_order(weight, channels_last);
  Tensor mask = empty_in_order(weight, ScalarType::Bool, channels_last);
  if (walk.numel() == 0) return mask;
  for_float_type(weight.scalar_type(), [&](auto zero) {
    using Key =
        std::conditional_t<sizeof(zero) == 2, int16_t, std::conditional_t<sizeof(zero) == 4, int32_t, int64_t>>;
    nm_mask_kernel<Key><<<blocks_for(walk.numel()), kThreads, 0, current_stream(weight)>>>(
        data<Key>(input), output<bool>(mask), walk, n, m);
    check_launch();
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CUDA, m) { m.impl("nm_mask", TORCH_BOX(&nm_mask)); }

}  // namespace fxslim
