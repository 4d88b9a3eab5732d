// The dense plan of doubles, by torch's operators alone: no kernel of ours computes in double, and gradcheck asks for
// it.
#pragma once

#include "cuda/conv_call.h"

namespace prunekernels {

at::Tensor plain_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias);
at::Tensor plain_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight);

// In place: 0 where dead, rows times scale. Null mask: nothing is dead.
void mask_grad_of_doubles(const at::Tensor& grad, const DeviceMask* mask, const OptionalTensor& scale);

}  // namespace prunekernels
