// What keeps the dense plan exact without waiting for the device. The vendor's convolution of weights whose dead
// kernels are zeros is right unless a NaN or an infinity sits in a dead channel of the operand, or meets a dead filter:
// 0 * NaN. Such a number shows in every result of its group at that place, so one channel of each group is witness for
// all:
//   find_leaks    found[block] = did a witness see anything but +0 (a dead channel), or anything that is not finite?
//   repair        where found says so, the whole result again, by a plain kernel that reads live numbers only
// Floors: find_leaks one 32-byte sector a pixel (NHWC) or one plane an image (NCHW); repair, with nothing to do, a
// launch. When there is something to do it is slow, a few hundred GFLOP/s, and that is rare.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "cuda/kernels/pack_weights.h"
#include "cuda/kernels/stream.h"

namespace prunekernels {

struct Witnesses {
  const int32_t* words;  // device [count]: 2 * channel + (1: must be +0, 0: must be finite), ascending
  int64_t count;
};
constexpr int32_t witness_word(int64_t channel, bool zero) { return static_cast<int32_t>(2 * channel + zero); }

struct LeakSearch {
  const void* result;  // [N, channels, H, W], dense
  int64_t images, pixels, channels;
  Element element;
  bool channels_last;
  Witnesses witnesses;
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
  const int32_t* slot;    // device [channels of the result]: kDead: 0; kConstant: the bias
  const uint32_t* pairs;  // device [K, ceil(C / G / 32)], the mask table's
};

// Nothing is written where found[0 .. count) are zeros. found null: always.
cudaError_t launch_repair_fwd(const Repair& repair, const int32_t* found, int count, cudaStream_t stream);
cudaError_t launch_repair_grad_input(const Repair& repair, const int32_t* found, int count, cudaStream_t stream);

}  // namespace prunekernels
