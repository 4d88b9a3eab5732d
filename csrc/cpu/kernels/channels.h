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

// sums[c] = sum over n, p of (n, c, p), for channels begin..end whose slot is not kDead; 0 for the others. Null slot:
// all of them. Sums are formed in double, each channel by one thread, so the result does not depend on the number of
// threads.
template <typename T>
void channel_sums(const ChannelView<const T>& x, const int32_t* slot, T* sums, int64_t begin, int64_t end);

// What the dense plan asks of dead channels: before it that they are finite, after it that they are zero.
enum class Property { finite, zero };

// Whether every channel with a negative slot has the property; planes: channels begin..end of the tensor, pixels:
// pixels begin..end of [n * p], all channels of each at a time, since a cache line holds many.
template <typename T>
bool dead_planes_are(Property property, const ChannelView<const T>& x, const int32_t* slot, int64_t begin, int64_t end);
template <typename T>
bool dead_pixels_are(Property property, const T* x, int64_t channels, const int32_t* slot, int64_t begin, int64_t end);

// Sets channel c to a value.
template <typename T>
void fill_channel(const ChannelView<T>& x, int64_t c, T value);

}  // namespace prunekernels
