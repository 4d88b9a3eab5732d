// Channel gather and scatter between full-width and compact activations, on elements of 2, 4 or 8 bytes.
//   gather   compact[n, j] = full[n, index[j]]                  (0 where index[j] < 0)
//   scatter  full[n, index[j]] = compact[n, j], 0 elsewhere     (index[j] < 0 is dropped)
// "planes": NCHW, a channel is contiguous. "pixels": NHWC, a pixel's channels are contiguous.
#pragma once

#include <cstdint>

namespace prunekernels {

struct ChannelList {
  const int32_t* index;  // [live], strictly increasing but for entries < 0
  const int32_t* slot;   // [channels], the inverse: position in index, or < 0
  const uint64_t* bits;  // [ceil(channels / 64)], bit c set where channel c is listed; null if index has entries < 0
  int64_t live, channels;
};

// Range: planes begin..end of [n * live] (gather) or [n * channels] (scatter).
void gather_planes(const char* full, char* compact, int64_t plane_bytes, int64_t begin, int64_t end,
                   const ChannelList& list);
void scatter_planes(const char* compact, char* full, int64_t plane_bytes, int64_t begin, int64_t end,
                    const ChannelList& list);

// Range: pixels begin..end of [n * H * W].
using PixelCopy = void (*)(const char* from, char* to, int64_t begin, int64_t end, const ChannelList& list);
PixelCopy pick_gather_pixels(int64_t element_bytes, const ChannelList& list);
PixelCopy pick_scatter_pixels(int64_t element_bytes, const ChannelList& list);

}  // namespace prunekernels
