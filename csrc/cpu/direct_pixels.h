// The direct plan on CPU for NHWC and bfloat16.
#pragma once

#include "cpu/dense_conv.h"
#include "plan/plan_choice.h"

namespace prunekernels {

bool pixels_serve(const PlanCase& c);

at::Tensor pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias);
at::Tensor pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight);
at::Tensor pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale);

}  // namespace prunekernels
