// Batch norm of float activations, channel by channel.
//   forward   y = (x - mean) * scale + bias
//   backward  grad_x = scale * grad + factor * (x - mean) + offset
// "segment": contiguous floats of one channel (a plane of NCHW). "rows": `rows` runs of `length` floats that begin
// `stride` floats apart; each position of a run has its own parameters. For NHWC a run is a pixel and its positions are
// the channels, or several pixels where one is shorter than a vector.
#pragma once

#include <cstdint>

namespace prunekernels {

struct NormSums {        // of one channel
  double first, second;  // forward: of x - shift and (x - shift)^2; backward: of grad and grad * (x - mean)
};

struct NormKernels {
  // first += x - shift, second += (x - shift)^2
  void (*sums_segment)(const float* x, int64_t length, float shift, NormSums& sums);
  void (*apply_segment)(const float* x, float* y, int64_t length, float mean, float scale, float bias);
  // first += grad, second += grad * (x - mean)
  void (*grad_sums_segment)(const float* grad, const float* x, int64_t length, float mean, NormSums& sums);
  void (*grad_apply_segment)(const float* grad, const float* x, float* grad_x, int64_t length, float mean, float scale,
                             float factor, float offset);

  // The same position by position. Sums are floats over at most kNormRows rows; the caller adds those up in double.
  void (*sums_rows)(const float* x, int64_t rows, int64_t length, int64_t stride, const float* shift, float* first,
                    float* second);
  void (*apply_rows)(const float* x, float* y, int64_t rows, int64_t length, int64_t stride, const float* mean,
                     const float* scale, const float* bias);
  void (*grad_sums_rows)(const float* grad, const float* x, int64_t rows, int64_t length, int64_t stride,
                         const float* mean, float* first, float* second);
  void (*grad_apply_rows)(const float* grad, const float* x, float* grad_x, int64_t rows, int64_t length,
                          int64_t stride, const float* mean, const float* scale, const float* factor,
                          const float* offset);
};

constexpr int64_t kNormRows = 256;       // at most so many additions into one float
constexpr int64_t kNormPositions = 512;  // of a run, so that its parameters and sums stay in L1

const NormKernels& norm_kernels();  // the best the instruction set in force allows

}  // namespace prunekernels
