// The dense plan: the vendor's convolution at full width of weights whose dead kernels are zeros, and a repair of
// what 0 * NaN makes of that (kernels/nan_repair.h). It costs a pass over the weights and, where something is dead on
// the way, two small launches more than the plain convolution; no pass over activations.
#pragma once

#include "cuda/conv_call.h"

namespace prunekernels {

at::Tensor dense_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias);
at::Tensor dense_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight);

}  // namespace prunekernels
