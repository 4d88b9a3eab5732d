// Sizes of a convolution as ctypes passes them.
#pragma once

#include "core/conv_shape.h"

namespace prunekernels {

// sizes: N, C, H, W, K, R, S, P, Q, G, stride, padding, dilation (two each)
inline ConvShape shape_of(const int64_t* z) {
  return {z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7], z[8], z[9], {z[10], z[11]}, {z[12], z[13]}, {z[14], z[15]}};
}

}  // namespace prunekernels
