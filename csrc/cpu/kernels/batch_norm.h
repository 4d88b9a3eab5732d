// Batch norm of float activations, channel by channel.
//   forward   y = (x - mean) * scale + bias
//   backward  grad_x = scale * grad + factor * (x - mean) + offset
// "segment": contiguous floats of one channel (a plane of NCHW). "rows": `rows` runs of `length` floats, `stride`
// apart, each position with parameters of its own (pixels of NHWC: positions are channels, repeated where one pixel is
// shorter than a vector).
#pragma once

#include <cstdint>

namespace prunekernels {

struct NormSums {  // over a channel, of x about a shift; in the backward pass of grad, and of grad * (x - mean)
  double first, second;
};

struct NormKernels {
  // sum += x - shift, squares += (x - shift)^2
  void (*sums_segment)(const float* x, int64_t length, float shift, NormSums& sums);
  void (*apply_segment)(const float* x, float* y, int64_t length, float mean, float scale, float bias);
  // sum += grad, dot += grad * (x - mean)
  void (*grad_sums_segment)(const float* grad, const float* x, int64_t length, float mean, NormSums& sums);
  void (*grad_apply_segment)(const float* grad, const float* x, float* grad_x, int64_t length, float mean, float scale,
                             float factor, float offset);

  // The same by position; sums are floats of at most kNormRows rows, for the caller to add up in double.
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

constexpr int64_t kNormRows = 256;       // additions in one float
constexpr int64_t kNormPositions = 512;  // of one run, so that its parameters and sums stay in L1

const NormKernels& norm_kernels();  // the best the instruction set in force allows

}  // namespace prunekernels
