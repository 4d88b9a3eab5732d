// Keeps the dense plan exact without waiting for the device. The dense plan runs the vendor's convolution on weights
// whose dead kernels are zeros. The result is wrong only where a NaN or an infinity of a dead channel meets such a
// zero: 0 * NaN = NaN. A NaN so leaked shows in every result channel of its group at that pixel, so it is enough to
// look at one sentinel channel of each group:
//   find_leaks    found[block] = 1 if a sentinel channel is not what it must be: +0 (if dead), finite (if live)
//   repair        if any found is set, computes the whole result again with a plain kernel that reads live numbers only
// Cost: find_leaks reads one 32-byte sector a pixel (NHWC) or one plane an image (NCHW). repair costs a launch where
// nothing was found; where something was, it runs at a few hundred GFLOP/s only, but that is rare.
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

struct LeakSearch {
  const void* result;  // [N, channels, H, W], dense
  int64_t images, pixels, channels;
  Element element;
  bool channels_last;
  SentinelChannels sentinels;
};

int leak_blocks(const LeakSearch& search);  // entries of found; 0: nothing to search

cudaError_t launch_find_leaks(const LeakSearch& search, int32_t* found, cudaStream_t stream);  // [leak_blocks()]

struct Repair {
  ConvShape shape;
  Element element;
  bool channels_last;     // both activations, dense
  const void* operand;    // forward: x [N, C, H, W]; input gradient: grad_out [N, K, P, Q]
  const void* weight;     // [K, C / G, R, S]
  WeightStrides strides;  // of the weight
  const void* bias;       // [K] or null; forward only
  void* result;           // forward: y [N, K, P, Q]; input gradient: grad_x [N, C, H, W]
  const int32_t* slot;    // device [channels of the result]: kDead gives 0, kConstant the bias
  const uint32_t* pairs;  // device [K, ceil(C / G / 32)], the mask table's
};

// Writes nothing if found[0 .. count) are all 0. found null: always repairs.
cudaError_t launch_repair_fwd(const Repair& repair, const int32_t* found, int count, cudaStream_t stream);
cudaError_t launch_repair_grad_input(const Repair& repair, const int32_t* found, int count, cudaStream_t stream);

}  // namespace prunekernels
