// From tensors to what the torch-free kernels take: element types, pointers, weight layouts.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/scalar_types.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

// Calls f(T{}) with T = float, double, BFloat16 or Half; the dtype was checked before.
template <typename F>
auto with_element(at::ScalarType type, F f) {
  switch (type) {
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      return f(float{});
  }
}

template <typename T>
const T* const_elements(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* elements(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Null where there is no tensor.
inline const float* const_floats(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

// Of a weight dense in either format; a 1x1 kernel is dense in both, and its channels are adjacent.
inline WeightLayout layout_of(const at::Tensor& weight) {
  const int64_t taps = weight.size(2) * weight.size(3), channels = weight.size(1);
  return weight.is_contiguous(at::MemoryFormat::ChannelsLast) ? WeightLayout{taps * channels, 1, channels}
                                                              : WeightLayout{taps * channels, taps, 1};
}

}  // namespace prunekernels
