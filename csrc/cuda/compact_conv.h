// The compact plan: gather live channels, the vendor's convolution of the live sizes, scatter with zeros. With one
// group the counts are rounded up to a multiple of 8 with zero channels and filters: odd counts fall off the tensor
// cores.
#pragma once

#include "cuda/conv_call.h"

namespace prunekernels {

at::Tensor compact_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias);
at::Tensor compact_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight);
at::Tensor compact_grad_weight(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& x,
                               const at::Tensor& weight, const OptionalTensor& scale);

}  // namespace prunekernels
