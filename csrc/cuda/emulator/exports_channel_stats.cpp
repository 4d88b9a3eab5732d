#include "cuda/kernels/channel_stats.h"

using namespace prunekernels;

extern "C" {

int pk_channel_stats_workspace(int element, int64_t N, int64_t C, int64_t pixels, bool channels_last, int64_t* floats) {
  *floats = channel_stats_workspace({N, C, pixels, static_cast<Element>(element), channels_last, false});
  return 0;
}
int pk_channel_stats(int element, int64_t N, int64_t C, int64_t pixels, bool channels_last, bool relu, const void* x,
                     float* mean, float* workspace) {
  return launch_channel_stats({N, C, pixels, static_cast<Element>(element), channels_last, relu}, x, mean, workspace,
                              nullptr);
}
}
