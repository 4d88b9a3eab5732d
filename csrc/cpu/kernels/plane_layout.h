// Where the rows of a plane lie when the microkernels read it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/conv_axes.h"

namespace prunekernels {

// Rows of `pitch` floats, padding included as zeros; the zeros at the right end of a row are those at the left end of
// the next. A strided axis is taken apart into `step` phases, so that a vector of outputs reads a vector of
// neighbouring floats, whatever the stride.
struct PlaneLayout {
  Axis rows, columns;
  int64_t low_row, low_column, extra_rows, width, pitch;
  std::vector<int> phase;  // [row phase * columns.step + column phase] -> place, -1: no tap reads it
  int phases = 0;
  bool in_place;  // the plane already lies so: nothing to copy

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

  // No padding lies between rows of outputs, so images that follow one another make one long plane.
  bool gapless() const { return extra_rows == 0 && pitch == columns.longest(); }

  template <typename Visit>
  void each_tap(Visit visit) const {
    for (const AxisClass& r : rows.classes)
      for (const AxisClass& c : columns.classes)
        for (const Tap& a : r.taps)
          for (const Tap& b : c.taps) visit(a, b);
  }

  // Positions that are computed for a block of output rows, those between the rows (garbage) included.
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
