// From a tensor's dtype to the element type of the torch-free kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/scalar_types.h"

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

}  // namespace prunekernels
