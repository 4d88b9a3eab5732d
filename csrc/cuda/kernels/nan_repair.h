// Keeps the dense plan exact without waiting for the device. The dense plan runs the vendor's convolution on weights
// whose dead kernels are zeros. The result is wrong only where a NaN or an infinity of a dead channel meets such a
// zero: 0 * NaN = NaN. A NaN so leaked shows in every result channel of its group at that pixel, so it is enough to
// look at one sentinel channel of each group. Where that is not what it must be, +0 (if dead) or finite (if live), the
// group's channels at that pixel are computed again by plain sums that read live numbers only.
// Cost: one launch, which reads one 32-byte sector a pixel (NHWC) or one plane an image (NCHW). What it finds is
// computed at a few hundred GFLOP/s only, but that is rare.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "cuda/kernels/pack_weights.h"
#include "cuda/kernels/stream.h"

namespace prunekernels {

struct SentinelChannels {
  const int32_t* words;  // device [count]: sentinel_word() of each, ascending
  int64_t count;
};
// zero: the channel must hold +0 alone; else finite numbers.
constexpr int32_t sentinel_word(int64_t channel, bool zero) { return static_cast<int32_t>(2 * channel + zero); }

struct Repair {
  ConvShape shape;
  Element element;
  bool channels_last;          // both activations, dense
  const void* operand;         // forward: x [N, C, H, W]; input gradient: grad_out [N, K, P, Q]
  const void* weight;          // [K, C / G, R, S]
  WeightStrides strides;       // of the weight
  const void* bias;            // [K] or null; forward only
  void* result;                // forward: y [N, K, P, Q]; input gradient: grad_x [N, C, H, W]
  const int32_t* slot;         // device [channels of the result]: kDead gives 0, kConstant the bias
  const uint32_t* pairs;       // device [K, ceil(C / G / 32)], the mask table's
  SentinelChannels sentinels;  // of the result
};

// cudaErrorInvalidValue: 2^31 pixels and sentinels or more in one image.
cudaError_t launch_repair_fwd(const Repair& repair, cudaStream_t stream);
cudaError_t launch_repair_grad_input(const Repair& repair, cudaStream_t stream);

}  // namespace prunekernels
