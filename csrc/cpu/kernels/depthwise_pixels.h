// Depthwise convolutions, NHWC, float: rows of pixels are gathered to their live channels, a vector of which is
// computed at a time, and results are scattered among zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "cpu/kernels/depthwise_conv.h"
#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

// A block of rows, [rows][columns][live channels], with zeros around the image.
class GatheredRows {
 public:
  GatheredRows(Axis rows, Axis columns, const ChannelList& list);

  void set_rows(int64_t rows) { block_rows_ = rows; }  // outputs of a block
  const Axis& rows() const { return rows_; }
  const Axis& columns() const { return columns_; }
  int64_t over() const { return rows_.highest_tap() - low_row_ + 1 - rows_.step; }  // rows that all outputs share
  int64_t row_floats() const { return pitch_ * list_.live; }
  int64_t output_row() const { return rows_.step * row_floats(); }  // from what an output reads to what the next does
  int64_t output_column() const { return columns_.step * list_.live; }
  int64_t floats() const { return (block_rows_ * rows_.step + over()) * row_floats(); }

  // As PaddedPlane has them.
  void find_parts(const AxisClass& rows, const AxisClass& columns, int64_t kernel_columns,
                  std::vector<DepthwisePart>& parts, std::vector<int32_t>& taps) const;
  void pack(const float* image, int64_t first_row, int64_t rows, float* packed) const;

 private:
  const Axis rows_, columns_;
  const ChannelList list_;
  const PixelCopy gather_;
  const int64_t low_row_, low_column_;
  int64_t first_column_, end_column_, pitch_;
  int64_t block_rows_ = 0;
};

class DepthwisePixels {
 public:
  DepthwisePixels(DepthwiseConv::Direction direction, const ConvShape& shape, const ChannelList& list, int64_t threads);

  int64_t weight_floats() const { return blocks_ * lanes() * (taps() + 1); }
  // [K, 1, R, S] and [K] or null -> packed: of each vector of live channels its bias and its taps
  void pack_weights(const float* weight, const WeightLayout& layout, const float* bias, float* packed) const;

  int64_t tasks() const { return shape_.N * row_blocks_; }
  int64_t scratch_floats() const { return x_.floats() + lanes() + sums_floats_; }
  // Writes the task's rows of the result, zeros of dead channels included.
  void run(const float* operand, const float* weights, float* result, int64_t task, float* scratch) const;

 private:
  struct Class {
    const AxisClass *rows, *columns;
    std::vector<DepthwisePart> parts;
    int64_t first_tap;
  };

  int64_t taps() const { return static_cast<int64_t>(tap_.size()); }
  int64_t lanes() const { return kernels_.lanes; }

  const ConvShape shape_;
  const ChannelList list_;
  const DepthwiseKernels& kernels_;
  const PixelCopy scatter_;
  GatheredRows x_;
  std::vector<Class> classes_;
  std::vector<int32_t> tap_;
  int64_t blocks_;  // vectors of live channels
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
  // Every element of grad_weight: the sum of partial gradients times scale.
  void write(const float* partial, const float* scale, const WeightLayout& layout, float* grad_weight) const;

 private:
  int64_t taps() const { return static_cast<int64_t>(tap_.size()); }
  int64_t share_floats() const { return blocks_ * taps() * kernels_.lanes; }

  const ConvShape shape_;
  const ChannelList list_;
  const DepthwiseKernels& kernels_;
  const PixelCopy gather_;
  GatheredRows x_;
  std::vector<DepthwisePart> parts_;
  std::vector<int32_t> tap_;
  int64_t blocks_, block_rows_, row_blocks_, shares_, grad_floats_;
};

}  // namespace prunekernels
