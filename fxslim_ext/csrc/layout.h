// How a tensor is walked: in contiguous or in channels-last order, seen as (outer, channels, inner).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fxslim {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element (o, c, i) lies at (o * channels + c) * inner + i. Per tensor: outer = channels = 1.
struct Walk {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t numel() const { return outer * channels * inner; }
  int64_t period() const { return channels * inner; }
};

inline Walk walk_of(const Tensor& x, std::optional<int64_t> axis, bool channels_last) {
  Walk walk;
  const int64_t dim = x.dim();
  if (!axis.has_value()) {
    walk.inner = x.numel();
    return walk;
  }
  STD_TORCH_CHECK(*axis >= 0 && *axis < dim, "axis ", *axis, " is out of range for ", dim, " dims");
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dim; ++d)
    if (!(channels_last && d == 1)) order.push_back(d);
  if (channels_last) order.push_back(1);
  bool before = true;
  for (int64_t d : order) {
    if (d == *axis) {
      walk.channels = x.size(d);
      before = false;
    } else if (before) {
      walk.outer *= x.size(d);
    } else {
      walk.inner *= x.size(d);
    }
  }
  return walk;
}

inline MemoryFormat memory_format(const Tensor& x, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "channels_last needs 4 or 5 dims, got ", x.dim());
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// x itself where it already lies in this order, else a copy that does.
inline Tensor in_order(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(x, memory_format(x, channels_last));
}

inline Tensor empty_in_order(const Tensor& like, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(
      like.sizes(), dtype, std::nullopt, like.device(), std::nullopt, memory_format(like, channels_last));
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size}, dtype);
}

inline Tensor empty_scalar(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, {}, dtype);
}

// The type that arithmetic on x is done in: double for double, float for the rest.
inline ScalarType math_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_parameters(const char* name, const Tensor& t, const Tensor& x, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(t.numel() == count, name, " has ", t.numel(), " elements, expected ", count);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.device() == x.device(), name, " is on another device than the input");
}

inline int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8; }

}  // namespace fxslim
