// Batch norm of float or bfloat16 activations, channel by channel, in float arithmetic.
//   forward   y = (x - mean) * scale + bias, and of that: y + add, relu of either
//   backward  grad_x = scale * grad + factor * (x - mean) + offset; behind a relu grad counts where y > 0
// "segment": contiguous elements of one channel (a plane of NCHW). "rows": `rows` runs of `length` elements that begin
// `stride` elements apart; each position of a run has its own parameters. For NHWC a run is a pixel and its positions
// are the channels, or several pixels where one is shorter than a vector.
#pragma once

#include <cstdint>

#include "core/scalar_types.h"

namespace prunekernels {

struct NormSums {        // of one channel
  double first, second;  // forward: of x - shift and (x - shift)^2; backward: of grad and grad * (x - mean)
};

// A tensor's rows.
struct NormRows {
  int64_t count, length, stride;
};

// By position. keep: all bits set, or none where the result is exactly 0, whatever was read.
struct NormScales {
  const float *mean, *scale, *bias;
  const uint32_t* keep;
};
struct NormSlopes {
  const float *mean, *scale, *factor, *offset;
  const float* bias;  // null unless there is a relu behind the norm
  const uint32_t* keep;
};

// What becomes of y. add: elements that lie as those of y, or null.
template <typename T>
struct NormEnd {
  const T* add;
  bool relu;
};

// The relu behind a norm, in the backward pass: of (x - mean) * scale + bias. By channel; no relu: has_relu is false.
struct NormGate {
  bool has_relu;
  float scale, bias;
};
// By position; null: no relu.
struct NormGates {
  const float *scale, *bias;
};

template <typename T>
struct NormKernels {
  // first += x - shift, second += (x - shift)^2
  void (*sums_segment)(const T* x, int64_t length, float shift, NormSums& sums);
  void (*apply_segment)(const T* x, T* y, int64_t length, float mean, float scale, float bias, const NormEnd<T>& end);
  // first += grad, second += grad * (x - mean)
  void (*grad_sums_segment)(const T* grad, const T* x, int64_t length, float mean, const NormGate& gate,
                            NormSums& sums);
  void (*grad_apply_segment)(const T* grad, const T* x, T* grad_x, int64_t length, float mean, float scale,
                             float factor, float offset, const NormGate& gate);

  // The same position by position. Sums are floats over at most kNormRows rows; the caller adds those up in double.
  void (*sums_rows)(const T* x, const NormRows& rows, const float* shift, float* first, float* second);
  void (*apply_rows)(const T* x, T* y, const NormRows& rows, const NormScales& by_position, const NormEnd<T>& end);
  void (*grad_sums_rows)(const T* grad, const T* x, const NormRows& rows, const float* mean, const NormGates& gates,
                         float* first, float* second);
  void (*grad_apply_rows)(const T* grad, const T* x, T* grad_x, const NormRows& rows, const NormSlopes& by_position);
};

constexpr int64_t kNormRows = 256;       // at most so many additions into one float
constexpr int64_t kNormPositions = 512;  // of a run, so that its parameters and sums stay in L1

// The best that the instruction set in force allows, for T = float or BFloat16.
template <typename T>
const NormKernels<T>& norm_kernels();

}  // namespace prunekernels
