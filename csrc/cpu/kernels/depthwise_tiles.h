// How depthwise work is cut: tiles of outputs, blocks of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/packed_planes.h"

namespace prunekernels {

// visit(row, rows, vector, vectors): tiles of about equal size
template <typename Visit>
void each_tile(const DepthwiseTiles& tiles, int64_t rows, int64_t vectors, Visit visit) {
  const int64_t across = divide_up(vectors, kMostTileVectors);
  for (int64_t j = 0; j < across; ++j) {
    const int64_t vector = vectors * j / across, width = vectors * (j + 1) / across - vector;
    const int64_t down = divide_up(rows, tiles.most_rows[width]);
    for (int64_t i = 0; i < down; ++i) {
      const int64_t row = rows * i / down;
      visit(row, rows * (i + 1) / down - row, vector, width);
    }
  }
}

// Rows that fit into `floats`, where each takes row_floats and all together `over` rows more.
inline int64_t rows_that_fit(int64_t row_floats, int64_t over, int64_t floats) {
  constexpr int64_t kFewest = 8;
  return std::max(kFewest, floats / std::max<int64_t>(1, row_floats) - over);
}

}  // namespace prunekernels
