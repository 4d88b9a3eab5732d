// A convolution and its input gradient as one thing: output positions read operand positions through taps. Along an
// axis, output o of a class lies at first + every * o of the result and reads the operand at step * o + tap.at.
//   forward        one class; step = stride; tap r at r * dilation - padding
//   input gradient a class per residue modulo the stride, of the taps that reach it; step = 1
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/conv_shape.h"

namespace prunekernels {

struct Tap {
  int64_t index;  // kernel row or column
  int64_t at;     // operand position that output 0 reads
};

struct AxisClass {
  int64_t first, every, count;  // outputs first, first + every, ...
  std::vector<Tap> taps;        // may be empty: such outputs are 0
};

struct Axis {
  int64_t operand, result;  // sizes
  int64_t step;
  std::vector<AxisClass> classes;

  int64_t lowest() const {
    int64_t low = 0;
    bool any = false;
    for (const AxisClass& c : classes)
      for (const Tap& t : c.taps) low = any ? std::min(low, t.at) : t.at, any = true;
    return low;
  }
  int64_t highest_tap() const {
    int64_t high = lowest();
    for (const AxisClass& c : classes)
      for (const Tap& t : c.taps) high = std::max(high, t.at);
    return high;
  }
  int64_t longest() const {
    int64_t count = 0;
    for (const AxisClass& c : classes) count = std::max(count, c.count);
    return count;
  }
};

// axis: 0 = rows, 1 = columns
inline Axis forward_axis(const ConvShape& s, int axis) {
  const int64_t taps = axis == 0 ? s.R : s.S, count = axis == 0 ? s.P : s.Q;
  AxisClass all{0, 1, count, {}};
  for (int64_t r = 0; r < taps; ++r) all.taps.push_back({r, r * s.dilation[axis] - s.padding[axis]});
  return {axis == 0 ? s.H : s.W, count, s.stride[axis], {all}};
}

inline Axis grad_input_axis(const ConvShape& s, int axis) {
  const int64_t taps = axis == 0 ? s.R : s.S, size = axis == 0 ? s.H : s.W, stride = s.stride[axis];
  Axis a{axis == 0 ? s.P : s.Q, size, 1, {}};
  for (int64_t f = 0; f < std::min(stride, size); ++f) {
    AxisClass c{f, stride, (size - f + stride - 1) / stride, {}};
    for (int64_t r = 0; r < taps; ++r) {
      const int64_t reach = f + s.padding[axis] - r * s.dilation[axis];
      if (reach % stride == 0) c.taps.push_back({r, reach / stride});
    }
    a.classes.push_back(c);
  }
  return a;
}

}  // namespace prunekernels
