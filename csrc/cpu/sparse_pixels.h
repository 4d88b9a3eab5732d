// The sparse plan on CPU for NHWC and bfloat16: blocks of kernels are skipped, in the form that suits their size.
#pragma once

#include "ops/conv_args.h"
#include "plan/plan_choice.h"

namespace prunekernels {

bool sparse_pixels_serve(const PlanCase& c);
// What is computed, of the kernels between all listed filters and channels: blocks of four results and two operands,
// or, for the gradient of the weight, of four filters and a channel. Counted without regard to dead channels.
double listed_share(const PlanCase& c);
double sparse_pixels_cost(const PlanCase& c);

at::Tensor sparse_pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias);
at::Tensor sparse_pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out,
                                    const at::Tensor& weight);
at::Tensor sparse_pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                     const at::Tensor& weight, const OptionalTensor& scale);

}  // namespace prunekernels
