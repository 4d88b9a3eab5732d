#include "cpu/kernels/pixel_axis.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace prunekernels {

PixelAxis::PixelAxis(const ConvShape& s, int axis, bool forward)
    : operand(axis ? s.W : s.H), result(axis ? s.Q : s.P), padding(s.padding[axis]) {
  const int64_t taps = axis ? s.S : s.R, dilation = taps == 1 ? 0 : s.dilation[axis];
  const int64_t common = std::gcd(s.stride[axis], dilation);
  spacing = dilation / common;
  if (forward) {
    stride = s.stride[axis] / common, step = common;
    phases.resize(1);
    for (int64_t t = 0; t < taps; ++t) phases[0].taps.push_back({t, t * spacing});
  } else {
    const int64_t count = s.stride[axis];
    phases.resize(count);
    for (int64_t t = taps - 1; t >= 0; --t) {
      const int64_t first = t * dilation - padding;  // the result that reads operand 0
      const int64_t phase = (first % count + count) % count;
      phases[phase].taps.push_back({t, (phase - first) / count});
    }
    std::swap(operand, result);
    stride = step = 1, padding = 0;
  }
  low = INT64_MAX, high = INT64_MIN;
  for (const Phase& phase : phases)
    for (const Tap& tap : phase.taps) low = std::min(low, tap.offset), high = std::max(high, tap.offset);
  for (int64_t i = 0; i < phase_count(); ++i) phases[i].results = (result - i + phase_count() - 1) / phase_count();
}

void PixelAxis::gather(const PixelKernels& kernels, const ChannelList& list, const uint16_t* row, int64_t first,
                       int64_t count, uint16_t* to, int64_t to_pixel) const {
  const auto inside = [&](int64_t end) { return std::clamp<int64_t>((end + step - 1) / step - first, 0, count); };
  const int64_t left = inside(padding), right = inside(padding + operand);
  std::memset(to, 0, left * to_pixel * sizeof(*to));
  kernels.gather(row + ((first + left) * step - padding) * list.channels, step * list.channels, list.channels,
                 list.bits, list.live, to + left * to_pixel, to_pixel, right - left);
  std::memset(to + right * to_pixel, 0, (count - right) * to_pixel * sizeof(*to));
}

bool flatten(const ConvShape& s, PixelAxis& rows, PixelAxis& columns, int64_t& images) {
  if (s.taps() > 1 || s.stride[0] > 1 || s.stride[1] > 1 || s.padding[0] || s.padding[1]) return false;
  columns.operand = columns.result = columns.phases[0].results = images * rows.result * columns.result;
  rows.operand = rows.result = rows.phases[0].results = images = 1;
  return true;
}

}  // namespace prunekernels
