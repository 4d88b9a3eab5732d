// Convolution that skips single dead kernels: float32, NCHW, on CUDA cores, any kernel size, stride, padding, dilation
// and groups. m = the live kernels of the mask (after all three masks).
//   sparse_fwd          y[n, k] = bias[k] + sum over c with m[k, c] of x[n, c] * w[k, c];  0 for a dead filter
//   sparse_grad_input   dx[n, c] = sum over k with m[k, c] of the transposed convolution of dy[n, k] with w[k, c]
//   sparse_grad_weight  dw[k, c] = scale[k] * correlation over n of x[n, c] with dy[n, k];  0 where not m[k, c]
// Weights, channels and gradients that no live kernel touches are never read. Every element of a result is written,
// once. Sums are in float; the same call gives the same bits. An Inf or NaN in a live channel may spread to all taps of
// a kernel's gradient.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "core/sparse_lists.h"
#include "cuda/kernels/stream.h"

namespace prunekernels {

struct SparseConv {
  ConvShape shape;
  const SparseLists* lists;     // on the host: counts and offsets
  const int32_t* device_words;  // copy of lists->words() on the device, 16-byte aligned
  // Floats between filters, channels (of one group) and taps (r * S + s) of the weight, or of its gradient; row-major:
  // {C / G * R * S, R * S, 1}, channels last: {C / G * R * S, 1, C / G}.
  int64_t filter_stride, channel_stride, tap_stride;
  int multiprocessors;  // of the device; the work is cut so that all of them have some
};

// Whether these kernels serve the shape: R, S <= 32, offsets of 32 bits suffice, and a tile fits into shared memory
// (with a dilation of hundreds it does not).
bool sparse_serves(const ConvShape& shape);

// This and the others return cudaErrorInvalidValue for a shape that sparse_serves() refuses.
cudaError_t launch_sparse_fwd(const float* x,       // [N, C, H, W]
                              const float* weight,  // [K, C / G, R, S], strides as given
                              const float* bias,    // [K] or null
                              float* y,             // [N, K, P, Q]
                              const SparseConv& conv, cudaStream_t stream);

cudaError_t launch_sparse_grad_input(const float* dy,      // [N, K, P, Q]
                                     const float* weight,  // [K, C / G, R, S], strides as given
                                     float* dx,            // [N, C, H, W]
                                     const SparseConv& conv, cudaStream_t stream);

// Floats of workspace for launch_sparse_grad_weight(): a partial gradient for each split of the images.
int64_t sparse_grad_weight_workspace(const SparseConv& conv);

cudaError_t launch_sparse_grad_weight(const float* x,         // [N, C, H, W]
                                      const float* dy,        // [N, K, P, Q]
                                      const uint32_t* pairs,  // [K, ceil(C / G / 32)], on the device: the mask table's
                                      const float* scale,     // [K] or null; 0 gives exact 0, whatever the sum
                                      float* workspace,       // [sparse_grad_weight_workspace()]
                                      float* dw,              // [K, C / G, R, S], strides as given
                                      const SparseConv& conv, cudaStream_t stream);

}  // namespace prunekernels
