// The pieces of the dense plan on CPU: where-masks around the vendor's full-width convolution, each doing nothing where
// it can.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/conv_args.h"

namespace prunekernels {

// where(live, weight, 0): the weight itself if its dead kernels hold zeros already.
at::Tensor masked_weight(const at::Tensor& weight, const MaskTable& mask, at::MemoryFormat format);
// where(live filter, bias, 0)
at::Tensor masked_bias(const at::Tensor& bias, const MaskTable& mask);
// In place: where(live, grad * scale, 0).
void mask_grad_weight_(const at::Tensor& grad, const MaskTable* mask, const float* scale);

struct Side {  // channels of the operand or of the result, and which of them are live
  const int32_t* slot;
  int64_t channels;
};

// After a full-width convolution whose dead weights are zeros: did every dead channel of the operand stay without
// effect, and are the dead channels of the result exactly 0? Zero weights make it so unless the operand holds a NaN or
// an infinity, and that would show in every channel of the result, so one channel a group answers: a dead one must be
// 0, or else any one finite.
// An image's few channels are read whole instead, where that is less.
bool nothing_leaked(const at::Tensor& operand, const at::Tensor& result, const Side& operand_side,
                    const Side& result_side, int64_t groups);

// Where they do not hold: a copy of the operand with zeros in the channels of negative slot, to convolve again ...
at::Tensor without_dead_channels(const at::Tensor& x, const int32_t* slot);
// ... and, in place, zeros in the dead channels of the result.
void zero_dead_channels_(const at::Tensor& x, const int32_t* slot);

// In place: the output of a live filter without live kernels is its bias, or 0 without one.
void write_constant_channels_(const at::Tensor& x, const int32_t* slot, const at::Tensor* bias);

// [N, K, P, Q] -> [K], 0 where slot is kDead; null slot: all live.
at::Tensor channel_sums(const at::Tensor& x, const int32_t* slot);

}  // namespace prunekernels
