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

enum class Property { finite, zero };

// Whether all of channel c in images begin..end has the property; -0 does not count as zero.
template <typename T>
bool channel_is(Property property, const ChannelView<const T>& x, int64_t c, int64_t begin, int64_t end);

// x[p, c] &= keep[c] for NHWC pixels begin..end: all bits set keeps a channel, none makes it +0.
template <typename T>
void keep_channels(T* x, int64_t channels, const T* keep, int64_t begin, int64_t end);

// Sets channel c to a value.
template <typename T>
void fill_channel(const ChannelView<T>& x, int64_t c, T value);

}  // namespace prunekernels
