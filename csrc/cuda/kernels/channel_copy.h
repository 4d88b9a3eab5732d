// Copies activations from full width to compact, back, and between two live lists. NHWC or NCHW, dense, of any dtype.
//   gather_channels   compact[n, j] = full[n, index[j]]                       (0 where index[j] < 0)
//   scatter_channels  full[n, c] = compact[n, slot[c]]                        (0 where slot[c] < 0: dead or constant)
//   join              out[n, o] = a[n, slot_a[o]] + alpha * b[n, slot_b[o]]   (a term whose slot is < 0 left out)
// Every element of the result is written, once. The gradients of a join are two gathers. From one live list to another,
// gather and scatter compute the same (entries of -1 included): gather is faster where the result is narrower than the
// source, scatter where it is wider.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace prunekernels {

struct ChannelCopy {
  int64_t images, pixels;  // N, H * W
  int64_t full, compact;   // channels, padding of ragged groups included
  int element_bytes;       // 2, 4 or 8: whatever the type, these kernels only copy
  bool channels_last;
  int64_t granule = 1;  // channel_granule(), for speed; 1 always serves
};

// The largest granule (8, 4, 2 or 1) such that the list consists of granules: each aligned group of so many channels at
// full width is listed whole, in order and aligned, or not at all. channels_last then copies granules as vectors.
inline int64_t channel_granule(const int32_t* index,  // [compact], on the host
                               int64_t compact, int64_t full) {
  const auto together = [&](int64_t j, int64_t granule) {
    for (int64_t i = 0; i < granule; ++i)
      if (index[j] < 0 ? index[j + i] >= 0 : index[j] % granule != 0 || index[j + i] != index[j] + i) return false;
    return true;
  };
  int64_t granule = 8;
  while (compact % granule || full % granule) granule /= 2;
  for (int64_t j = 0; j < compact; j += granule)
    while (!together(j, granule)) granule /= 2;
  return granule;
}

cudaError_t launch_gather_channels(const void* full,      // [N, full, H, W]
                                   const int32_t* index,  // [compact], on the device
                                   void* compact,         // [N, compact, H, W]
                                   const ChannelCopy& copy, cudaStream_t stream);

cudaError_t launch_scatter_channels(const void* compact,  // [N, compact, H, W]
                                    const int32_t* slot,  // [full], on the device
                                    void* full,           // [N, full, H, W]
                                    const ChannelCopy& copy, cudaStream_t stream);

struct ChannelJoin {
  int64_t images, pixels;  // N, H * W
  int64_t a, b, out;       // channels
  Element element;         // sums are formed in float
  bool channels_last;
  float alpha = 1;
};

cudaError_t launch_join(const void* a,          // [N, a, H, W]
                        const int32_t* slot_a,  // [out], on the device
                        const void* b,          // [N, b, H, W]
                        const int32_t* slot_b,  // [out], on the device
                        void* out,              // [N, out, H, W]
                        const ChannelJoin& join, cudaStream_t stream);

}  // namespace prunekernels
