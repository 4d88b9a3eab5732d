// Gradient of the weight over planes: for every live kernel and tap, the dot product of the output's gradient with the
// operand moved by the tap. NCHW, float. Each share of the images adds into a partial gradient of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/packed_planes.h"
#include "cpu/kernels/tile_grid.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

class PlaneGradWeight {
 public:
  // shared: all live filters of a group meet all its live channels; otherwise each filter those of its live kernels.
  PlaneGradWeight(const ConvShape& shape, const MaskTable& mask, bool shared, LaneAxis lane_axis, int64_t threads);

  int64_t partial_floats() const { return partial_floats_; }
  int64_t scratch_floats() const;
  // Blocks of rows, or of whole images: partial gradients of disjoint blocks add up.
  int64_t blocks() const { return groups_ * row_blocks_; }
  // partial = the products of blocks first..end, for the part-th share of the filters.
  void run(const float* x, const float* grad, int64_t first, int64_t end, int64_t part, int64_t parts, float* partial,
           float* scratch) const;
  // Filters begin..end of grad_weight, every element, from the sum of `count` partial gradients that lie in a row.
  void write(const float* partial, int64_t count, const float* scale, const WeightLayout& layout, float* grad_weight,
             int64_t begin, int64_t end) const;

 private:
  struct Operands {  // of one tile: channels, each moved by a tap, or by a kernel row's three taps
    int count;
    int32_t channel[kMaxDotXs];  // within its group
    int32_t tap[kMaxDotXs];      // the first of them
    int64_t offset[kMaxDotXs];
  };
  struct Filters {  // of one tile, and the operands they meet
    int count;
    int32_t filter[kMaxDotFilters];
    int64_t operands, end;  // in order_
    int64_t dot;            // start in a partial gradient: [tile][filter][operand][tap]
  };
  struct Block {  // of images and rows, packed
    const float *x, *grad;
    int64_t images, first_row, rows;
    int64_t planes;     // images, or vectors of images
    int64_t positions;  // LaneAxis::pixels: of the rows, of all images if they are joined
    float* packed_grad;
  };

  void find_window(bool shared);
  void add_shared(int64_t group);
  void add_own();
  void add_operands(const int32_t* channels, size_t count);
  void add_filters(const int32_t* filters, int count, int64_t operands);
  void pack_grad(const float* image, int images, int64_t first_row, int64_t rows, float* packed) const;
  void compute(const Filters& filters, const Block& block, float* partial) const;
  void dot_windows(const DotTile& tile, float* out) const;

  const ConvShape shape_;
  const MaskTable mask_;
  const LaneAxis lane_axis_;
  const Microkernels& kernels_;
  PackedPlanes x_;
  bool grad_in_place_, joined_;  // joined: several images without gaps make one long plane
  int taps_per_operand_, filters_per_tile_;
  bool window_, whole_;  // dot products by microkernels_window.h
  std::vector<Operands> operands_;
  std::vector<int32_t> order_;  // places in operands_, as the filters meet them
  std::vector<Filters> filters_;
  std::vector<int32_t> tile_of_;  // filter -> which of filters_, -1: dead
  int64_t block_rows_, row_blocks_;
  int64_t group_planes_, groups_;  // images, or vectors of images, of a block; blocks of a row block
  int64_t grad_floats_;            // of a packed plane
  int64_t partial_floats_ = 0;
  std::vector<TileGrid> grid_;  // window_: [rows of a block]
  std::vector<int32_t> cells_;  // LaneAxis::images: 0, 1, 2, ...
};

}  // namespace prunekernels
