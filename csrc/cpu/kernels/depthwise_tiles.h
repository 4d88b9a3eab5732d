// How depthwise work is cut: tiles of outputs, blocks of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/conv_axes.h"
#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/packed_planes.h"

namespace prunekernels {

// visit(row, rows, vector, vectors): tiles of about equal size, row by row, as memory is fetched ahead.
template <typename Visit>
void each_tile(const DepthwiseTiles& tiles, int64_t rows, int64_t vectors, Visit visit) {
  const int64_t across = divide_up(vectors, kMostTileVectors);
  const int64_t down = divide_up(rows, tiles.most_rows[divide_up(vectors, across)]);
  for (int64_t i = 0; i < down; ++i) {
    const int64_t row = rows * i / down, height = rows * (i + 1) / down - row;
    for (int64_t j = 0; j < across; ++j) {
      const int64_t vector = vectors * j / across;
      visit(row, height, vector, vectors * (j + 1) / across - vector);
    }
  }
}

// The taps of these rows and columns as parts. offset(row, column): where a tap reads, in floats from the output's
// position. S: columns of the kernel.
template <typename Offset>
std::vector<DepthwisePart> parts_of(std::vector<Tap> rows, const std::vector<Tap>& columns, int64_t row_step, int64_t S,
                                    Offset offset) {
  // Outputs step through rows of one residue, one after the other.
  const auto residue = [&](const Tap& t) { return (t.at % row_step + row_step) % row_step; };
  std::sort(rows.begin(), rows.end(), [&](const Tap& a, const Tap& b) {
    return residue(a) != residue(b) ? residue(a) < residue(b) : a.at < b.at;
  });
  std::vector<DepthwisePart> parts;
  for (const Tap& column : columns)
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t tap = rows[i].index * S + column.index;
      const bool follows = i > 0 && rows[i].at == rows[i - 1].at + row_step;
      if (!follows || parts.back().rows == kMostPartRows) {
        parts.push_back({offset(rows[i], column), 1, tap, 0});
        continue;
      }
      DepthwisePart& part = parts.back();
      if (part.rows == 1) part.tap_step = tap - part.tap;  // the same for all, as taps are evenly spaced
      ++part.rows;
    }
  return parts;
}

// Rows that fit into `floats`, where each takes row_floats and all together `over` rows more.
inline int64_t rows_that_fit(int64_t row_floats, int64_t over, int64_t floats) {
  constexpr int64_t kFewest = 8;
  return std::max(kFewest, floats / std::max<int64_t>(1, row_floats) - over);
}

}  // namespace prunekernels
