// Batch norm of the live channels of channels_last activations x [pixels, channels], pixels = N H W:
//
//   y = (x - mean) invstd weight + bias       mean and variance of the batch, or running ones
//   grad_x = weight invstd (g - mean of g - (x - mean) invstd^2 (mean of g (x - mean)))    without the means in eval
//
// With what follows: y + add, relu of either. Backward, where a relu alone follows, grad_x of the gradient behind it: g
// counts where y > 0, and y is computed again.
//
// Three kernels each way: sums of parts of the pixels, their sum, and the values. Floats are summed about the channel's
// first value, parts in double, in an order that depends on the problem alone: results repeat bit by bit.
// Least cost, elements of 2 bytes: 3 * 2 bytes a value forward (x twice, y), 4 * 2 with a sum (add), 5 * 2 backward
// (grad and x twice, grad_x).
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace prunekernels {

struct NormShape {
  int64_t pixels, channels;
  Element element;
  const int32_t* feature;  // device [channels]: where the channel's parameters are; -1: dead, zeros are written
  const int32_t* place;    // device [channels]: where its mean and invstd go; -1: nowhere. The dead ones' are 0
};

int64_t batch_norm_workspace(const NormShape& shape);  // in floats, either way

struct NormScales {  // device [places] each
  float *scale, *offset;
};

struct BatchNorm {
  NormShape shape;
  const float *weight, *bias;         // [features]; null: 1 and 0
  float *running_mean, *running_var;  // [features]; null: not there. Read in eval, moved in training
  bool training;
  double momentum, eps;
  const void* x;      // [pixels, channels]
  void* y;            // [pixels, channels]; null: statistics alone
  float* mean;        // [places]
  float* invstd;      // [places]
  NormScales scales;  // nulls: not asked for
  float* workspace;
};

struct BatchNormApply {  // y = (x - mean) scale + offset
  NormShape shape;
  const float* mean;  // [places]
  NormScales scales;
  const void *x, *add;  // [pixels, channels]; add: null if nothing is added
  bool relu;
  void* y;  // [pixels, channels]
};

struct BatchNormBackward {
  NormShape shape;
  const float* weight;         // [features]; null: 1
  const float *mean, *invstd;  // [places]
  bool training;
  NormScales relu;                 // of a norm with a relu behind it; nulls: grad is that of y
  const void *grad, *x;            // [pixels, channels]
  void* grad_x;                    // [pixels, channels]
  float *grad_weight, *grad_bias;  // [features], of which those of live channels are written
  float* workspace;
};

// No pixels: nothing is launched. cudaErrorInvalidValue: more than 2^31 - 1 channels.
cudaError_t launch_batch_norm(const BatchNorm& norm, cudaStream_t stream);
cudaError_t launch_batch_norm_apply(const BatchNormApply& norm, cudaStream_t stream);
cudaError_t launch_batch_norm_backward(const BatchNormBackward& norm, cudaStream_t stream);

}  // namespace prunekernels
