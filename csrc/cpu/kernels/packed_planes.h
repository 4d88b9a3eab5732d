// Copies the live planes of an operand into the form that PlaneLayout describes. What the lanes of a vector hold:
//   LaneAxis::pixels  neighbouring pixels of one image; planes that lie right already are not copied
//   LaneAxis::images  the same pixel of as many images, so that neither narrow planes nor unaligned taps cost anything;
//                     the price is a transposition
// A cell is one pixel in that form: a float, or a vector.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/plane_layout.h"

namespace prunekernels {

enum class LaneAxis { pixels, images };

std::vector<int32_t> without_padding(const int32_t* index, int64_t begin, int64_t end);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a block: about `fit` at most, and such that the threads get equally many blocks of all groups; where blocks
// would shrink to a row or two for that, as many rows as fit.
int64_t balanced_rows(int64_t rows, int64_t fit, int64_t groups, int64_t threads);

class PackedPlanes {
 public:
  PackedPlanes(PlaneLayout layout, std::vector<int32_t> live, int64_t channels, LaneAxis lane_axis,
               const Microkernels& kernels);

  // The size of a block: so many output rows of one image; or, in a gapless layout, all rows of several images.
  void set_block(int64_t rows, int64_t images = 1);

  const PlaneLayout& layout() const { return layout_; }
  const std::vector<int32_t>& live() const { return live_; }
  int32_t place(int32_t channel) const { return place_[channel]; }
  int64_t cell() const { return cell_; }

  bool in_place() const { return layout_.in_place && lane_axis_ == LaneAxis::pixels && block_images_ == 1; }
  int64_t floats() const { return in_place() ? 0 : count() * channel_floats_; }  // of a packed block
  int64_t line_floats() const { return 2 * line_floats_; }                       // of the workspace `lines` of pack()
  // Output 0 of the block reads its operand at start() + channel_offset() + tap_offset().
  int64_t channel_offset(int64_t place) const { return (in_place() ? live_[place] : place) * channel_floats_; }
  int64_t tap_offset(const Tap& row, const Tap& column) const {
    return layout_.offset(row, column, phase_cells_) * cell_;
  }
  const float* start(const float* image, int64_t first_row, const float* packed) const {
    return in_place() ? image + first_row * layout_.pitch : packed;
  }
  // image [images, channels, rows, columns] -> packed, as output rows first_row..first_row + rows need it.
  void pack(const float* image, int64_t image_floats, int images, int64_t first_row, int64_t rows, float* packed,
            float* lines) const;

 private:
  int64_t count() const { return static_cast<int64_t>(live_.size()); }
  int64_t operand_row(int64_t first_row, int64_t u, int64_t phase) const {
    return layout_.low_row + (first_row + u) * layout_.rows.step + phase;
  }
  void pack_row(const float* row, const int* phase, float* plane, int64_t at, float* lines) const;
  void pack_pixels(const float* plane, int64_t image_floats, int images, int64_t first_row, int64_t rows, float* to,
                   float* lines) const;
  void pack_images(const float* plane, int64_t image_floats, int images, int64_t first_row, int64_t rows,
                   float* to) const;

  const PlaneLayout layout_;
  const std::vector<int32_t> live_;
  std::vector<int32_t> place_;  // channel -> place, -1
  const LaneAxis lane_axis_;
  const Microkernels& kernels_;
  const int64_t cell_;
  int64_t block_images_ = 1;
  int64_t phase_cells_ = 0, channel_floats_ = 0, line_floats_ = 0;
  std::vector<int32_t> cells_;  // LaneAxis::images: [rows of a block][columns of the operand] -> cell
};

}  // namespace prunekernels
