// The direct plan of depthwise convolutions on CPU: float, either layout.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/conv_args.h"
#include "plan/plan_choice.h"

namespace prunekernels {

bool depthwise_serves(const PlanCase& c);
double depthwise_cost(Plan plan, const PlanCase& c);  // of any depthwise convolution, in multiply-adds as in plan.h

at::Tensor depthwise_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias);
at::Tensor depthwise_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& weight);
at::Tensor depthwise_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                 const at::Tensor& weight, const OptionalTensor& scale);

}  // namespace prunekernels
