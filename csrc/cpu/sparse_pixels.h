// The sparse plan on CPU for bfloat16 in channels_last: kernels of our own that skip blocks of kernels.
#pragma once

#include "ops/conv_args.h"
#include "plan/plan_choice.h"

namespace prunekernels {

bool sparse_pixels_serve(const PlanCase& c);
// Listed kernels, dead ones within a block's included, of the kernels between all listed filters and channels.
double listed_share(const MaskTable& mask, Direction direction);

at::Tensor sparse_pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias);
at::Tensor sparse_pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out,
                                    const at::Tensor& weight);
at::Tensor sparse_pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                     const at::Tensor& weight, const OptionalTensor& scale);

}  // namespace prunekernels
