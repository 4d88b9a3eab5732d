// Per-channel passes over an activation or its gradient, in either layout.
#pragma once

#include <cstdint>

namespace prunekernels {

template <typename T>
struct ChannelView {  // element (n, c, p) lies at data[n * batch + c * channel + p * pixel]
  T* data;
  int64_t batches, pixels;
  int64_t batch, channel, pixel;  // strides in elements
};

// sums[c] = sum over n, p of x(n, c, p) for channels begin..end; 0 where slot[c] is kDead (null slot: none is). Sums
// are formed in double. One thread sums a whole channel, so the result does not depend on the number of threads.
template <typename T>
void channel_sums(const ChannelView<const T>& x, const int32_t* slot, T* sums, int64_t begin, int64_t end);

enum class Property { finite, zero };

// A channel, and what it has to be.
struct Sentinel {
  Property property;
  int64_t channel;
};

struct PixelList {
  const int32_t* pixels;  // null: all
  int64_t count;
};

// Whether channel c has the property at these pixels of images begin..end. -0 does not count as zero.
template <typename T>
bool channel_is(Property property, const ChannelView<const T>& x, int64_t c, const PixelList& list, int64_t begin,
                int64_t end);

// Whether all sentinels hold, likewise. NHWC: pixel by pixel, since channels share lines and pages.
template <typename T>
bool sentinels_hold(const Sentinel* sentinels, int64_t count, const ChannelView<const T>& x, const PixelList& list,
                    int64_t begin, int64_t end);

// Zeros in the channels gone[count] of x; what else there is comes from a tensor of the same layout, unless from is
// null. NCHW: images begin..end; NHWC: pixels begin..end of all images.
template <typename T>
void copy_without(const T* from, const ChannelView<T>& x, const int32_t* gone, int64_t count, int64_t begin,
                  int64_t end);

// x[p, c] = x[p, c] & keep[c] | values[c], bit by bit, for NHWC pixels begin..end: all bits set keep a channel, no bit
// set gives it a value.
template <typename T>
void set_channels(T* x, int64_t channels, const T* keep, const T* values, int64_t begin, int64_t end);

// Sets channel c to a value.
template <typename T>
void fill_channel(const ChannelView<T>& x, int64_t c, T value);

}  // namespace prunekernels
