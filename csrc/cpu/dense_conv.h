// The pieces of the dense plan on CPU: where-masks around the vendor's full-width convolution, each doing nothing where
// it can.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_args.h"

namespace prunekernels {

// where(live, weight, 0): the weight itself if its dead kernels hold zeros already.
at::Tensor masked_weight(const at::Tensor& weight, const MaskTable& mask, at::MemoryFormat format);
// where(live filter, bias, 0)
at::Tensor masked_bias(const at::Tensor& bias, const MaskTable& mask);
// In place: where(live, grad * scale, 0).
void mask_grad_weight_(const at::Tensor& grad, const MaskTable* mask, const float* scale);

// x with the channels of negative slot zeroed: x itself if they are finite, since zero weights meet them.
at::Tensor finite_channels(const at::Tensor& x, const int32_t* slot);
// In place: exact zeros in dead channels. Zero weights have made them so, unless a live input was not finite: checked,
// then written.
void zero_dead_channels_(const at::Tensor& x, const int32_t* slot);
// In place: the output of a live filter without live kernels is its bias, or 0 without one.
void write_constant_channels_(const at::Tensor& x, const int32_t* slot, const at::Tensor* bias);

// [N, K, P, Q] -> [K], 0 where slot is kDead; null slot: all live.
at::Tensor channel_sums(const at::Tensor& x, const int32_t* slot);

}  // namespace prunekernels
