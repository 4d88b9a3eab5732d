#include "cpu/kernels/channel_stats.h"

#include <algorithm>

namespace prunekernels {
namespace {

constexpr int64_t kLanes = 16;

template <typename T, bool kRelu>
double activated(T value) {
  const double v = static_cast<double>(value);
  return kRelu && v < 0 ? 0.0 : v;  // keeps NaN
}

// lanes[i] += x[i], x[i + kLanes], ...
template <typename T, bool kRelu>
void add_plane(const T* x, int64_t pixels, double (&lanes)[kLanes]) {
  int64_t p = 0;
  for (; p + kLanes <= pixels; p += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += activated<T, kRelu>(x[p + i]);
  for (int64_t i = 0; p + i < pixels; ++i) lanes[i] += activated<T, kRelu>(x[p + i]);
}

// lanes[i] += the sum of channel first + i, for `count` channels (at most kLanes).
template <typename T, bool kRelu>
void add_pixels(const ChannelView<const T>& x, int64_t first, int64_t count, double (&lanes)[kLanes]) {
  for (int64_t n = 0; n < x.batches; ++n)
    for (int64_t p = 0; p < x.pixels; ++p) {
      const T* at = x.data + n * x.batch + p * x.pixel + first * x.channel;
      for (int64_t i = 0; i < count; ++i) lanes[i] += activated<T, kRelu>(at[i * x.channel]);
    }
}

template <typename T, bool kRelu>
void means_of(const ChannelView<const T>& x, float* means, int64_t begin, int64_t end) {
  const double total = static_cast<double>(x.batches * x.pixels);
  const auto mean = [&](double sum) { return total == 0 ? 0.0f : static_cast<float>(sum / total); };
  const bool planes = x.pixel == 1 && x.pixels > 1;
  for (int64_t first = begin; first < end; first += planes ? 1 : kLanes) {
    double lanes[kLanes] = {};
    if (planes) {
      for (int64_t n = 0; n < x.batches; ++n)
        add_plane<T, kRelu>(x.data + n * x.batch + first * x.channel, x.pixels, lanes);
      double sum = 0;
      for (double lane : lanes) sum += lane;
      means[first] = mean(sum);
      continue;
    }
    const int64_t count = std::min(kLanes, end - first);
    add_pixels<T, kRelu>(x, first, count, lanes);
    for (int64_t i = 0; i < count; ++i) means[first + i] = mean(lanes[i]);
  }
}

}  // namespace

template <typename T>
void channel_means(const ChannelView<const T>& x, bool relu, float* means, int64_t begin, int64_t end) {
  relu ? means_of<T, true>(x, means, begin, end) : means_of<T, false>(x, means, begin, end);
}

#define PK_INSTANTIATE(T) template void channel_means(const ChannelView<const T>&, bool, float*, int64_t, int64_t);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)
PK_INSTANTIATE(BFloat16)
PK_INSTANTIATE(Half)
#undef PK_INSTANTIATE

}  // namespace prunekernels
