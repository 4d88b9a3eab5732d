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

// How the operand's planes are laid out for the tile kernels: rows of `pitch` floats with the padding as zeros, a
// strided axis taken apart into `step` phases, so that whatever the stride one vector of outputs reads one vector of
// floats. The zeros right of a row and left of the next are the same ones.
struct PlaneLayout {
  Axis rows, columns;
  int64_t low_row, low_column, extra_rows, width, pitch;
  std::vector<int> phase;  // [row phase * columns.step + column phase] -> place, -1: no tap reads it
  int phases = 0;
  bool in_place;  // the plane as it is serves: nothing to copy

  PlaneLayout(Axis r, Axis c) : rows(std::move(r)), columns(std::move(c)) {
    low_row = rows.lowest(), low_column = columns.lowest();
    extra_rows = (rows.highest_tap() - low_row) / rows.step;
    width = columns.longest() + (columns.highest_tap() - low_column) / columns.step;
    pitch = width;
    if (columns.step == 1) {
      const int64_t left = std::max<int64_t>(0, -low_column);
      const int64_t right = std::max<int64_t>(0, low_column + width - columns.operand);
      pitch = std::max(width - std::min(left, right), columns.longest());
    }
    phase.assign(rows.step * columns.step, -1);
    each_tap([&](const Tap& r, const Tap& c) {
      int& place = phase[(r.at - low_row) % rows.step * columns.step + (c.at - low_column) % columns.step];
      if (place < 0) place = phases++;
    });
    in_place = rows.step == 1 && columns.step == 1 && low_row == 0 && low_column == 0 && extra_rows == 0 &&
               width == columns.operand && rows.longest() == rows.operand;
  }

  // Nothing lies between the rows of outputs, nor would between images.
  bool gapless() const { return extra_rows == 0 && pitch == columns.longest(); }

  template <typename Visit>
  void each_tap(Visit visit) const {
    for (const AxisClass& r : rows.classes)
      for (const AxisClass& c : columns.classes)
        for (const Tap& a : r.taps)
          for (const Tap& b : c.taps) visit(a, b);
  }

  // Positions, garbage between the rows included, of a block of output rows.
  int64_t positions(int64_t block_rows, int64_t row_length) const {
    return block_rows < 1 || row_length < 1 ? 0 : (block_rows - 1) * pitch + row_length;
  }
  int64_t phase_floats(int64_t block_rows, int64_t slack) const {
    return (block_rows - 1 + extra_rows) * pitch + width + slack;
  }
  int64_t offset(const Tap& r, const Tap& c, int64_t phase_floats) const {
    const int64_t down = r.at - low_row, right = c.at - low_column;
    return phase[down % rows.step * columns.step + right % columns.step] * phase_floats + down / rows.step * pitch +
           right / columns.step;
  }
};

}  // namespace prunekernels
