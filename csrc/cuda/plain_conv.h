// The dense plan in double: torch's operators alone, with masks made of the table where it lies. None of our kernels
// computes in double; gradcheck asks for it.
#pragma once

#include "cuda/conv_call.h"

namespace prunekernels {

// table: on the device; null: nothing is dead.
struct PlainConv {
  const at::Tensor* table;
  const ConvShape& shape;
  const ConvParams& params;
  at::MemoryFormat format;

  at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) const;
  at::Tensor grad_input(const at::Tensor& grad_out, const at::Tensor& weight) const;
  at::Tensor grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& scale) const;
};

}  // namespace prunekernels
