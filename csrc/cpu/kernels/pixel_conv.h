// Convolution over pixels: the direct plan for NHWC and bfloat16. Live channels of a few rows are gathered once, close
// together; tiles of pixels times live filters are computed from them, and each pixel's results go to their places.
// One group, whose listed filters and channels have all kernels between them.
//
// The input gradient at stride 1 is the same with input and output exchanged and the taps in reverse order.
#pragma once

#include <cstdint>
#include <vector>

#include "core/conv_shape.h"
#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_kernels.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

class PixelConv {
 public:
  enum Direction { kForward, kGradInput };
  static bool serves(Direction direction, const ConvShape& shape);

  // filters, channels: the live ones; valid as long as this is.
  PixelConv(Direction direction, const ConvShape& shape, const ChannelList& filters, const ChannelList& channels,
            int64_t threads);

  int64_t blocks() const { return blocks_; }  // of kPixelBlock results
  int64_t weight_words() const { return blocks_ * taps_ * pairs_ * kPixelBlock; }
  // [K, R, S, C] in memory -> packed [weight_words()], in packs() pieces: those from begin to end. scratch:
  // [pack_scratch()]
  int64_t packs() const { return forward_ ? blocks_ : pairs_; }
  void pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end, uint16_t* scratch) const;
  int64_t pack_scratch() const;

  int64_t tasks() const { return images_ * row_blocks_ * column_blocks_; }
  int64_t scratch_elements() const {
    return gathered_elements() + kMostPixels * columns_.stride * pixel_ + (kMostPixels * blocks_ + 1) * kPixelBlock;
  }
  // Writes the task's share of the result, zeros of dead channels included. start: float [blocks() * kPixelBlock].
  void run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result, int64_t task,
           uint16_t* scratch) const;

 private:
  struct Axis {  // of rows, of columns
    int64_t operand, result, taps, stride, padding, dilation;
    // How far the operands of `count` results reach.
    int64_t reach(int64_t count) const { return (count - 1) * stride + (taps - 1) * dilation + 1; }
  };

  int64_t gathered_elements() const { return rows_.reach(block_rows_) * columns_.reach(block_columns_) * pixel_; }
  void gather(const uint16_t* image, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t* to) const;

  const PixelKernels& kernels_;
  const bool forward_;
  const ChannelList &in_, &out_;  // of the operand and of the result
  Axis rows_, columns_;
  int64_t images_, taps_, pairs_, pixel_, blocks_;  // pixel_: elements of a gathered one
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_;
  bool writes_in_place_;
};

}  // namespace prunekernels
