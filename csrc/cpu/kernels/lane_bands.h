// How images fill the lanes of a vector (LaneAxis::images): a lane each, or, where there are too few of them, a lane
// for each of a few bands of rows. Bands read the rows of their neighbours; the last one of an image may be shorter.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/microkernels.h"

namespace prunekernels {

struct LaneBands {
  int64_t images, bands, rows;  // rows: of outputs (of one class) in a band

  int64_t units() const { return images * bands; }  // what a lane may hold

  // Rows begin..end of `count` units from `first` on, counted from where a band begins: at row step * rows * band of a
  // plane of `height` rows.
  LaneRuns runs(int64_t first, int count, int64_t step, int64_t begin, int64_t end, int64_t height, int64_t width,
                int64_t image_floats, int lanes) const {
    LaneRuns r{};
    const int64_t most = end - begin;
    int64_t any_begin = most, any_end = 0, all_begin = 0, all_end = count < lanes ? 0 : most;
    for (int n = 0; n < count; ++n) {
      const int64_t image = (first + n) / bands, top = (first + n) % bands * rows * step + begin;
      const int64_t low = std::clamp<int64_t>(-top, 0, most), high = std::clamp<int64_t>(height - top, low, most);
      r.at[n] = image * image_floats + top * width;
      r.begin[n] = static_cast<int32_t>(low * width), r.end[n] = static_cast<int32_t>(high * width);
      if (low < high) any_begin = std::min(any_begin, low), any_end = std::max(any_end, high);
      all_begin = std::max(all_begin, low), all_end = std::min(all_end, high);
    }
    r.any_begin = static_cast<int32_t>(any_begin * width), r.any_end = static_cast<int32_t>(any_end * width);
    r.all_begin = static_cast<int32_t>(all_begin * width), r.all_end = static_cast<int32_t>(all_end * width);
    return r;
  }
};

// The number of bands with which vectors have the fewest rows, those that neighbours share included. over: rows that a
// band reads beyond its own.
inline int64_t best_bands(int64_t images, int64_t rows, int64_t over, int64_t lanes) {
  int64_t best = 1, least = 0;
  for (int64_t bands = 1; bands <= std::min(rows, lanes); ++bands) {
    const int64_t groups = (images * bands + lanes - 1) / lanes;
    const int64_t cost = groups * (2 * ((rows + bands - 1) / bands) + over);
    if (bands == 1 || cost < least) best = bands, least = cost;
  }
  return best;
}

}  // namespace prunekernels
