// How a plane of cells is cut into tiles: the best grid for tiles that also read cells around them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace prunekernels {

struct TileGrid {
  int64_t down, across;

  // Calls visit(row, height, tiles down, column, width, tiles across) for each rectangle of equal tiles. Tiles differ
  // by one row and one column at most; the larger ones come first.
  template <typename Visit>
  void each(int64_t rows, int64_t columns, Visit visit) const {
    const auto stretches = [](int64_t size, int64_t tiles, auto take) {
      const int64_t least = size / tiles, larger = size % tiles;
      if (larger) take(int64_t{0}, least + 1, larger);
      take(larger * (least + 1), least, tiles - larger);
    };
    stretches(rows, down, [&](int64_t row, int64_t height, int64_t high) {
      stretches(columns, across,
                [&](int64_t column, int64_t width, int64_t wide) { visit(row, height, high, column, width, wide); });
    });
  }
};

// The cheapest grid for tiles that read `step` rows and columns for each of their own, and `over` and `beside` more,
// with `taps` multiply-adds a cell; `wait`: cycles between the multiply-adds of one tap if the tile is small.
// has(height, width): whether there is a microkernel for such a tile.
template <typename Has>
TileGrid best_grid(int64_t rows, int64_t columns, int64_t over, int64_t beside, int64_t taps, int64_t most_rows,
                   int64_t most_columns, Has has, int64_t step = 1, double wait = 4) {
  TileGrid best{0, 0};
  double least = 0;
  for (int64_t width = 1; width <= std::min(columns, most_columns); ++width)
    for (int64_t height = 1; height <= std::min(rows, most_rows) && has(height, width); ++height) {
      const TileGrid grid{(rows + height - 1) / height, (columns + width - 1) / width};
      const double tiles = static_cast<double>(grid.down * grid.across);
      // Each cell is fetched from L2 once and read at every tap. A tile of fewer than 8 sums waits for its own sums.
      const double around = step * (over * width + beside * height) + over * beside;
      const double cells = step * step * rows * columns + tiles * around;
      const double cost = 1.7 * cells + taps * std::max(0.5 * rows * columns, wait * tiles);
      if (!best.down || cost < least) best = grid, least = cost;
    }
  return best;
}

}  // namespace prunekernels
