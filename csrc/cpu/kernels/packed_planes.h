// Copies the live planes of an operand into the form that PlaneLayout describes. What the lanes of a vector hold:
//   LaneAxis::pixels  neighbouring pixels of one image; planes that lie right already are not copied
//   LaneAxis::images  the same pixel of as many images, or of bands of rows of fewer images (lane_bands.h), so that
//                     neither narrow planes nor unaligned taps cost anything; the price is a transposition
// A cell is one pixel in that form: a float, or a vector.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/kernels/lane_bands.h"
#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/plane_layout.h"

namespace prunekernels {

enum class LaneAxis { pixels, images };

struct Lanes {
  LaneAxis axis;
  int64_t bands;  // of each image; 1 for LaneAxis::pixels
};

std::vector<int32_t> without_padding(const int32_t* index, int64_t begin, int64_t end);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a block: about `fit` at most, and such that the threads get equally many blocks of all groups; where blocks
// would shrink to a row or two for that, as many rows as fit.
int64_t balanced_rows(int64_t rows, int64_t fit, int64_t groups, int64_t threads);

// What is packed at once.
struct PlaneBlock {
  int64_t first;             // the first image or, if there are bands, LaneBands' unit
  int count;                 // of those
  int64_t first_row, rows;   // of outputs, counted from where a band begins
  int64_t place, end_place;  // of the live channels
};

class PackedPlanes {
 public:
  PackedPlanes(PlaneLayout layout, std::vector<int32_t> live, int64_t channels, int64_t images, Lanes lanes,
               const Microkernels& kernels);

  // The size of a block: so many output rows of one image; or, in a gapless layout, all rows of several images.
  void set_block(int64_t rows, int64_t images = 1);

  const PlaneLayout& layout() const { return layout_; }
  const LaneBands& bands() const { return bands_; }
  const std::vector<int32_t>& live() const { return live_; }
  int32_t place(int32_t channel) const { return place_[channel]; }
  int64_t cell() const { return cell_; }
  // Stretches of the live channels, [places of the first, ..., all]: whole groups of `per_group` channels, several if
  // together they are small, or a part of one that has more than `most`. Those of a stretch are packed together.
  std::vector<int64_t> stretches(int64_t per_group, int64_t most) const;

  bool in_place() const { return layout_.in_place && lane_axis_ == LaneAxis::pixels && block_images_ == 1; }
  int64_t floats(int64_t channels) const { return in_place() ? 0 : channels * channel_floats_; }  // of a packed block
  int64_t line_floats() const { return 2 * line_floats_; }  // of the workspace `lines` of pack()
  // Output 0 of a block that begins with channel `first` reads its operand at
  // start() + channel_offset() + tap_offset().
  int64_t channel_offset(int64_t place, int64_t first) const {
    return (in_place() ? live_[place] : place - first) * channel_floats_;
  }
  int64_t phase_floats() const { return phase_cells_ * cell_; }
  int64_t tap_offset(const Tap& row, const Tap& column) const {
    return layout_.offset(row, column, phase_cells_) * cell_;
  }
  const float* start(const float* image, int64_t first_row, const float* packed) const {
    return in_place() ? image + first_row * layout_.pitch : packed;
  }
  // operand [images, channels, rows, columns] -> packed. follows: `packed` holds the block before, whose last rows are
  // the first of this one.
  void pack(const float* operand, const PlaneBlock& block, bool follows, float* packed, float* lines) const;
  // LaneAxis::images: zeros to the left and right of the rows of so many channels, which pack() does not write again.
  void pad(int64_t channels, float* packed) const;

 private:
  int64_t operand_row(int64_t first_row, int64_t u, int64_t phase) const {
    return layout_.low_row + (first_row + u) * layout_.rows.step + phase;
  }
  void pack_row(const float* row, const int* phase, float* plane, int64_t at, float* lines) const;
  void pack_pixels(const float* plane, const PlaneBlock& block, float* to, float* lines) const;
  void pack_images(const float* plane, const LaneRuns& runs, int64_t fresh, int64_t all, int64_t ahead,
                   float* to) const;

  const PlaneLayout layout_;
  const std::vector<int32_t> live_;
  std::vector<int32_t> place_;  // channel -> place, -1
  const LaneAxis lane_axis_;
  const Microkernels& kernels_;
  const LaneBands bands_;
  const int64_t cell_, image_floats_;
  int64_t block_rows_ = 0, block_images_ = 1;
  int64_t phase_cells_ = 0, channel_floats_ = 0, line_floats_ = 0;
  std::vector<int32_t> cells_;  // LaneAxis::images: [rows of a block][columns of the operand] -> cell
};

}  // namespace prunekernels
