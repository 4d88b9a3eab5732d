// mean[c] = (or +=) mean over n, h, w of x[n, c, h, w], or of its relu. In two kernels, in a fixed order: partial sums
// in fp32 into a workspace, then their sum. NaN stays NaN.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace prunekernels {

struct ChannelStats {
  int64_t N, C, pixels;  // pixels: H * W
  Element element;
  bool channels_last;  // x is [N, H, W, C], else [N, C, H, W]; dense either way
  bool relu;
};

int64_t channel_stats_workspace(const ChannelStats& problem);  // in floats

// Without any pixels the mean is 0.
cudaError_t launch_channel_stats(const ChannelStats& problem,
                                 const void* x,     // [N, C, H, W]
                                 float* mean,       // [C]
                                 float* workspace,  // [channel_stats_workspace(problem)]
                                 cudaStream_t stream);

}  // namespace prunekernels
