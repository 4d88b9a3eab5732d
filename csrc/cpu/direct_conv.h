// The direct and sparse plans on CPU: our own tile kernels over the planes of an NCHW tensor of floats, in which dead
// channels are neither copied nor computed. Direct: filters share lists of live channels. Sparse: a list per filter.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/conv_args.h"

namespace prunekernels {

at::Tensor direct_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias, bool sparse);
at::Tensor direct_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight,
                             bool sparse);
at::Tensor direct_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale, bool sparse);

}  // namespace prunekernels
