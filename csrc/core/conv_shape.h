// The sizes of one 2-D convolution, in the letters used everywhere: input [N, C, H, W], filters [K, C / G, R, S],
// output [N, K, P, Q].
#pragma once

#include <cstdint>

namespace prunekernels {

struct ConvShape {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t G;
  int64_t stride[2], padding[2], dilation[2];

  int64_t channels_per_group() const { return C / G; }
  int64_t taps() const { return R * S; }
  int64_t in_pixels() const { return H * W; }
  int64_t out_pixels() const { return P * Q; }
};

// Output length along one axis; < 1 where the (dilated) kernel does not fit into the padded input.
inline int64_t conv_out_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace prunekernels
