// Depthwise convolutions, NHWC, float, a vector of channels at a time, in one of two ways:
//   in place   all channels are read and multiplied where they lie; those of dead channels are written as zeros.
//   Outputs
//              at the border have fewer taps.
//   gathered   rows of pixels are gathered to their live channels, with zeros around the image, and results scattered
//              among zeros: less to compute, more to copy.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "cpu/kernels/depthwise_conv.h"
#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

// The vectors of channels that are computed.
class ChannelVectors {
 public:
  ChannelVectors(const ChannelList& list, int lanes, bool in_place);

  int64_t count() const { return count_; }
  int64_t pixel() const { return in_place_ ? list_.channels : list_.live; }  // channels of one
  // Where vector v begins in a pixel. In place the last one may share channels with the one before it.
  int64_t begin(int64_t v) const { return in_place_ ? std::min(v * lanes_, list_.channels - lanes_) : v * lanes_; }
  int last(int64_t v) const;                           // lanes that are written
  uint32_t live(int64_t v) const { return live_[v]; }  // a bit for each of them that is live
  int64_t channel(int64_t v, int64_t lane) const;      // -1: dead, or none
  // Of a live channel, the i-th: its vector and lane.
  std::pair<int64_t, int64_t> place(int64_t i) const;

 private:
  const ChannelList list_;
  const int64_t lanes_;
  const bool in_place_;
  int64_t count_;
  std::vector<uint32_t> live_;
};

// Outputs that have the same taps.
struct DepthwiseRegion {
  const AxisClass *row_class, *column_class;
  int64_t first_row, rows, first_column, columns;  // of the classes
  std::vector<DepthwisePart> parts;
};

// How an operand is read: where it lies, or from gathered rows with zeros around the image.
class PixelOperand {
 public:
  PixelOperand(Axis rows, Axis columns, int64_t kernel_columns, const ChannelList& list, bool in_place);

  const Axis& rows() const { return rows_; }
  const Axis& columns() const { return columns_; }
  const std::vector<DepthwiseRegion>& regions() const { return regions_; }
  int64_t output_row() const {
    return rows_.step * pitch_ * pixel_;
  }  // from what an output reads to what the next does
  int64_t output_column() const { return columns_.step * pixel_; }
  int64_t over() const { return rows_.highest_tap() - low_row_ + 1 - rows_.step; }  // rows that all outputs share

  void set_rows(int64_t rows) { block_rows_ = rows; }  // outputs of a block
  int64_t floats() const { return in_place_ ? 0 : (block_rows_ * rows_.step + over()) * pitch_ * pixel_; }
  // What output row `first_row` of the image reads; scratch [floats()] held zeros or another block before.
  const float* block(const float* image, int64_t first_row, int64_t rows, float* scratch) const;

 private:
  void find_regions(int64_t kernel_columns);

  const Axis rows_, columns_;
  const ChannelList list_;
  const bool in_place_;
  const PixelCopy gather_;
  const int64_t low_row_, low_column_, pixel_;
  int64_t first_column_, end_column_, pitch_;
  std::vector<DepthwiseRegion> regions_;
  int64_t block_rows_ = 0;
};

class DepthwisePixels {
 public:
  DepthwisePixels(DepthwiseConv::Direction direction, const ConvShape& shape, const ChannelList& list, int64_t threads);

  int64_t weight_floats() const { return vectors_.count() * vector_floats(); }
  // [K, R * S], and [K] or null -> packed: of each vector of channels its bias and its taps
  void pack_weights(const float* weight, const float* bias, float* packed) const;

  int64_t tasks() const { return shape_.N * row_blocks_; }
  int64_t scratch_floats() const { return x_.floats() + kernels_.lanes + sums_floats_; }
  // Before the first task of a scratch.
  void clear(float* scratch) const { std::fill(scratch, scratch + x_.floats(), 0.f); }
  // Writes the task's rows of the result, zeros of dead channels included.
  void run(const float* operand, const float* weights, float* result, int64_t task, float* scratch) const;

 private:
  int64_t vector_floats() const { return (1 + shape_.taps()) * kernels_.lanes; }

  const ConvShape shape_;
  const ChannelList list_;
  const DepthwiseKernels& kernels_;
  const bool in_place_;
  const ChannelVectors vectors_;
  const PixelCopy scatter_;
  PixelOperand x_;
  int64_t block_rows_, row_blocks_, sums_floats_;
};

class DepthwisePixelsGradWeight {
 public:
  DepthwisePixelsGradWeight(const ConvShape& shape, const ChannelList& list, int64_t threads);

  int64_t shares() const { return shares_; }
  int64_t partial_floats() const { return shares_ * share_floats(); }
  int64_t scratch_floats() const { return x_.floats() + grad_floats_ + 2 * kernels_.lanes; }
  // Writes its own part of partial.
  void run(const float* x, const float* grad, int64_t share, float* partial, float* scratch) const;
  // grad_weight [K, R * S]: the sum of partial gradients times scale; zeros where the filter is dead.
  void write(const float* partial, const float* scale, float* grad_weight) const;

 private:
  int64_t share_floats() const { return vectors_.count() * shape_.taps() * kernels_.lanes; }

  const ConvShape shape_;
  const ChannelList list_;
  const DepthwiseKernels& kernels_;
  const bool in_place_;
  const ChannelVectors vectors_;
  const PixelCopy gather_;
  PixelOperand x_;
  int64_t block_rows_, row_blocks_, shares_, grad_floats_;
};

}  // namespace prunekernels
