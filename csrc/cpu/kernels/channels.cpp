#include "cpu/kernels/channels.h"

#include <algorithm>
#include <cstddef>

#include "core/mask_table.h"
#include "core/scalar_types.h"

namespace prunekernels {
namespace {

constexpr int64_t kLanes = 16;

template <typename T>
double plane_sum(const T* plane, int64_t pixels) {
  double lanes[kLanes] = {};
  int64_t p = 0;
  for (; p + kLanes <= pixels; p += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += static_cast<double>(plane[p + i]);
  double sum = 0;
  for (; p < pixels; ++p) sum += static_cast<double>(plane[p]);
  for (double lane : lanes) sum += lane;
  return sum;
}

template <size_t bytes>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using type = uint64_t;
};
template <typename T>
using BitsOf = typename BitsOfSize<sizeof(T)>::type;

// The bits that are all ones in a NaN or an infinity, and in no other number.
template <typename T>
constexpr BitsOf<T> kExponent = 0;
template <>
constexpr uint32_t kExponent<float> = 0x7f800000;
template <>
constexpr uint64_t kExponent<double> = 0x7ff0000000000000;
template <>
constexpr uint16_t kExponent<BFloat16> = 0x7f80;
template <>
constexpr uint16_t kExponent<Half> = 0x7c00;

// Nonzero where the value lacks the property.
template <typename T>
BitsOf<T> offends(Property property, BitsOf<T> value) {
  return property == Property::zero ? value : (value & kExponent<T>) == kExponent<T>;
}

template <typename T>
T narrow(double value) {
  return Arithmetic<T>::narrow(static_cast<typename Arithmetic<T>::type>(value));
}

}  // namespace

template <typename T>
void channel_sums(const ChannelView<const T>& x, const int32_t* slot, T* sums, int64_t begin, int64_t end) {
  const auto dead = [&](int64_t c) { return slot && slot[c] == kDead; };
  if (x.pixel == 1) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0;
      if (!dead(c))
        for (int64_t n = 0; n < x.batches; ++n) sum += plane_sum(x.data + n * x.batch + c * x.channel, x.pixels);
      sums[c] = narrow<T>(sum);
    }
    return;
  }
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    double lanes[kLanes] = {};
    for (int64_t n = 0; n < x.batches; ++n)
      for (int64_t p = 0; p < x.pixels; ++p) {
        const T* at = x.data + n * x.batch + p * x.pixel + first * x.channel;
        for (int64_t i = 0; i < count; ++i) lanes[i] += static_cast<double>(at[i * x.channel]);
      }
    for (int64_t i = 0; i < count; ++i) sums[first + i] = dead(first + i) ? T{} : narrow<T>(lanes[i]);
  }
}

template <typename T>
bool channel_is(Property property, const ChannelView<const T>& x, int64_t c, const PixelList& list, int64_t begin,
                int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const BitsOf<T>* at = reinterpret_cast<const BitsOf<T>*>(x.data + n * x.batch + c * x.channel);
    BitsOf<T> offence = 0;  // no exit from within the loops, so that loads overlap
    if (list.pixels)
      for (int64_t i = 0; i < list.count; ++i) offence |= offends<T>(property, at[list.pixels[i] * x.pixel]);
    else
      for (int64_t p = 0; p < x.pixels; ++p) offence |= offends<T>(property, at[p * x.pixel]);
    if (offence) return false;
  }
  return true;
}

template <typename T>
bool sentinels_hold(const Sentinel* sentinels, int64_t count, const ChannelView<const T>& x, const PixelList& list,
                    int64_t begin, int64_t end) {
  if (x.pixel == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i)
      if (!channel_is(sentinels[i].property, x, sentinels[i].channel, list, begin, end)) return false;
    return true;
  }
  const int64_t pixels = list.pixels ? list.count : x.pixels;
  for (int64_t n = begin; n < end; ++n) {
    BitsOf<T> offence = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t pixel = list.pixels ? list.pixels[i] : i;
      const BitsOf<T>* at = reinterpret_cast<const BitsOf<T>*>(x.data + n * x.batch + pixel * x.pixel);
      for (int64_t j = 0; j < count; ++j) offence |= offends<T>(sentinels[j].property, at[sentinels[j].channel]);
    }
    if (offence) return false;
  }
  return true;
}

template <typename T>
void copy_without(const T* from, const ChannelView<T>& x, const int32_t* gone, int64_t count, int64_t begin,
                  int64_t end) {
  const bool nchw = x.pixel == 1;
  const int64_t row = nchw ? x.batch : x.pixel, run = nchw ? x.pixels : 1;
  for (int64_t i = begin; i < end; ++i) {
    T* to = x.data + i * row;
    if (from) std::copy(from + i * row, from + (i + 1) * row, to);
    for (int64_t j = 0; j < count; ++j) std::fill_n(to + gone[j] * x.channel, run, T{});
  }
}

template <typename T>
void set_channels(T* x, int64_t channels, const T* keep, const T* values, int64_t begin, int64_t end) {
  BitsOf<T>* bits = reinterpret_cast<BitsOf<T>*>(x);
  const BitsOf<T>*mask = reinterpret_cast<const BitsOf<T>*>(keep), *set = reinterpret_cast<const BitsOf<T>*>(values);
  for (int64_t p = begin; p < end; ++p)
    for (int64_t c = 0; c < channels; ++c) bits[p * channels + c] = (bits[p * channels + c] & mask[c]) | set[c];
}

template <typename T>
void fill_channel(const ChannelView<T>& x, int64_t c, T value) {
  for (int64_t n = 0; n < x.batches; ++n) {
    T* at = x.data + n * x.batch + c * x.channel;
    if (x.pixel == 1)
      std::fill(at, at + x.pixels, value);
    else
      for (int64_t p = 0; p < x.pixels; ++p) at[p * x.pixel] = value;
  }
}

#define PK_INSTANTIATE(T)                                                                                        \
  template void channel_sums(const ChannelView<const T>&, const int32_t*, T*, int64_t, int64_t);                 \
  template bool channel_is(Property, const ChannelView<const T>&, int64_t, const PixelList&, int64_t, int64_t);  \
  template bool sentinels_hold(const Sentinel*, int64_t, const ChannelView<const T>&, const PixelList&, int64_t, \
                               int64_t);                                                                         \
  template void copy_without(const T*, const ChannelView<T>&, const int32_t*, int64_t, int64_t, int64_t);        \
  template void set_channels(T*, int64_t, const T*, const T*, int64_t, int64_t);                                 \
  template void fill_channel(const ChannelView<T>&, int64_t, T);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
