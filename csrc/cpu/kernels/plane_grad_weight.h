// Weight gradient over planes: for each live kernel and tap, the dot product of the output's gradient with the input
// shifted by the tap. NCHW, float. Threads that share out the images each add into a partial gradient of their own.
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
  // shared: computes all live filters of a group times all its live channels (direct). Else live kernels only (sparse).
  PlaneGradWeight(const ConvShape& shape, const MaskTable& mask, bool shared, Lanes lanes, int64_t threads);

  int64_t partial_floats() const { return partial_floats_; }
  int64_t scratch_floats() const;
  // Groups that are computed one after the other, so that each share of the filters packs its own channels.
  int64_t stretches() const { return static_cast<int64_t>(stretches_.size()); }
  // A block is a few rows of an image, or a few whole images. Partial gradients of disjoint blocks add up.
  int64_t blocks() const { return groups_ * row_blocks_; }
  // partial = the gradient from blocks first..end alone, of the part-th of `parts` shares of the filters.
  void run(const float* x, const float* grad, int64_t first, int64_t end, int64_t part, int64_t parts, float* partial,
           float* scratch) const;
  // Writes every element of filters begin..end of grad_weight: scale times the sum of `count` partial gradients, which
  // lie one after the other.
  void write(const float* partial, int64_t count, const float* scale, const WeightLayout& layout, float* grad_weight,
             int64_t begin, int64_t end) const;

 private:
  struct Operands {  // of one tile: channels shifted by a tap each (or by the three taps of a kernel row)
    int count;
    int32_t channel[kMaxDotXs];  // within its group
    int32_t tap[kMaxDotXs];      // r * S + s; of three the first
    int64_t offset[kMaxDotXs];
  };
  struct Filters {  // of one tile, and the operands to multiply them with
    int count;
    int32_t filter[kMaxDotFilters];
    int64_t operands, end;  // in order_
    int64_t dot;            // where its products begin in a partial gradient: [tile][filter][operand][tap]
  };
  struct Stretch {  // channels of a few groups, or some of one group, and the tiles of filters that read them
    int64_t place, end_place, tile, end_tile;
  };
  struct Rectangle {  // of equal tiles, and where it begins
    Microkernels::DotWindow kernel;
    int64_t g, x, down, across;
  };
  struct Block {  // of images and rows, packed
    const float *x, *grad;
    int64_t first, images;  // images, or bands of images
    int64_t first_row, rows;
    int64_t planes;     // images, or vectors of them
    int64_t positions;  // LaneAxis::pixels: of the rows, of all images if they are joined
    float* packed_grad;
    int64_t ahead;  // from a filter's plane of the output's gradient to the next one's
  };

  void find_window(bool shared);
  Microkernels::DotWindow dot_window(int64_t height, int64_t width) const;
  int64_t stretch_of(int32_t channel) const;
  void add_shared(int64_t group);
  void add_own();
  void add_operands(const int32_t* channels, size_t count, const Stretch& stretch);
  void add_filters(const int32_t* filters, int count, int64_t operands, int64_t end, int64_t stretch);
  void pack_grad(const float* plane, int64_t first, int images, const Block& block, float* packed) const;
  void write_tile(const Filters& filters, int64_t k, const float* partial, int64_t count, const float* scale,
                  const WeightLayout& layout, float* to) const;
  void compute(const Filters& filters, const Block& block, float* partial) const;
  void dot_windows(DotTile& tile, float* out) const;

  const ConvShape shape_;
  const MaskTable mask_;
  const bool shared_;
  const LaneAxis lane_axis_;
  const Microkernels& kernels_;
  PackedPlanes x_;
  bool grad_in_place_, joined_;  // joined: several images without gaps make one long plane
  int taps_per_operand_, filters_per_tile_;
  bool window_ = false, whole_ = false;  // dot products by microkernels_window.h; the tile is the whole plane
  std::vector<Stretch> stretches_;
  int64_t most_channels_ = 0;  // of a stretch
  std::vector<Operands> operands_;
  std::vector<int32_t> order_;  // indices into operands_, in the order of the filters' tiles
  std::vector<Filters> filters_;
  std::vector<int32_t> tile_of_;  // [stretch][filter] -> index into filters_; -1: no live kernel
  int64_t block_rows_, row_blocks_;
  int64_t group_planes_, groups_;  // images (or vectors of them) of a block; how many such groups there are
  int64_t grad_floats_;            // of a packed plane
  int64_t partial_floats_ = 0;
  std::vector<std::vector<Rectangle>> rectangles_;  // window_: [rows of a block]
  std::vector<int32_t> cells_;                      // LaneAxis::images: 0, 1, 2, ...
};

}  // namespace prunekernels
