// Copies the live channels of NHWC pixels (bfloat16) into planes that lie as PlaneLayout says, for the quad kernels.
// What a cell is:
//   PlaneCell::pair     a word: two neighbouring live channels of a pixel, whose planes are one
//   PlaneCell::channel  16 bits: a channel of a pixel
// Images of a block follow one another in a plane; the zeros below one are those above the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_kernels.h"
#include "cpu/kernels/plane_layout.h"
#include "cpu/kernels/quad_kernels.h"

namespace prunekernels {

enum class PlaneCell { pair, channel };

// Which plane each channel or pair of channels of a pixel goes to, -1 for those that are dead. Empty where pixels must
// be gathered first, as the two channels of a pair do not lie together, or should be, as most channels are dead.
std::vector<int32_t> plane_places(const ChannelList& channels, PlaneCell cell);

// A few output rows of an image, or all rows of several images.
struct PixelBlock {
  int64_t image, images, first_row, rows;
};

// Shares out N images and their rows among blocks of about `fit` positions at most, `least` blocks if there are so
// many.
struct PixelBlocks {
  int64_t images, rows;        // of a block
  int64_t groups, row_blocks;  // of images, of rows
  int64_t N, all_rows;

  PixelBlocks(int64_t N, int64_t rows, int64_t row_positions, int64_t image_positions, int64_t fit, int64_t least);
  int64_t count() const { return groups * row_blocks; }
  PixelBlock operator[](int64_t i) const;
};

class PixelPlanes {
 public:
  static constexpr int64_t kLine = 64;  // pixels that are gathered at a time where rows follow one another

  PixelPlanes(PlaneLayout layout, const ChannelList& channels, PlaneCell cell);

  // The most that a block holds.
  void set_block(int64_t images, int64_t rows);

  const PlaneLayout& layout() const { return layout_; }
  int64_t count() const { return count_; }
  int64_t image_rows() const { return image_rows_; }  // from one image of a block to the next
  // Of a block, from the first output of the first image to the last of the last one, those between rows included.
  int64_t positions(const PixelBlock& block, int64_t columns) const {
    return ((block.images - 1) * image_rows_ + block.rows - 1) * layout_.pitch + columns;
  }
  int64_t image_positions() const { return image_rows_ * layout_.pitch; }

  int64_t elements() const { return count_ * plane_ * cell_; }  // of all planes
  int64_t line_elements() const {
    return (std::max(layout_.columns.operand, kLine) * pixel_ + kPixelBlock) / kPixelBlock * kPixelBlock;
  }
  // In cells; output 0 of a block reads its operand at their sum.
  int64_t plane(int64_t place) const { return place * plane_; }
  int64_t tap_offset(const Tap& row, const Tap& column) const { return layout_.offset(row, column, phase_cells_); }
  // x: [images, rows, columns, channels]; line: [line_elements()].
  void pack(const uint16_t* x, const PixelBlock& block, uint16_t* planes, uint16_t* line) const;

 private:
  void put(const PaddedRow& row, int64_t at, uint16_t* planes) const;
  void zero(int64_t at, int64_t cells, uint16_t* planes) const;
  void pack_line(const uint16_t* x, int64_t pixels, uint16_t* planes, uint16_t* line) const;
  int64_t pixel() const { return places_.empty() ? pixel_ : channels_.channels; }
  const uint16_t* gathered(const uint16_t* x, int64_t pixels, uint16_t* line) const;

  const PlaneLayout layout_;
  const ChannelList& channels_;
  const PlaneCell kind_;
  const int64_t cell_;   // elements of a cell
  const int64_t pixel_;  // elements of a gathered pixel
  const int64_t count_;
  const QuadKernels& kernels_;
  std::vector<int32_t> places_;  // [pairs or channels of a pixel as it is], -1: dead; empty where they are gathered
  int64_t image_rows_ = 0, phase_cells_ = 0, plane_ = 0;
};

}  // namespace prunekernels
