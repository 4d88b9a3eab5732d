// Convolution over planes by lists of steps: the direct plan (up to 8 filters share a list) and the sparse plan (each
// filter has its own). NCHW, float. The work is cut into tasks that write disjoint parts of the result.
//
// The input gradient is the same with input and output exchanged: a "filter" is then an input channel, an "operand" a
// channel of the output's gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/packed_planes.h"
#include "cpu/kernels/tile_grid.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

class PlaneConv {
 public:
  enum Direction { kForward, kGradInput };

  // shared: filters share lists, in which dead kernels are zeros (direct). Else each filter has its own list (sparse).
  PlaneConv(Direction direction, const ConvShape& shape, const MaskTable& mask, bool shared, Lanes lanes,
            int64_t threads);

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t weight_floats() const { return weight_floats_; }
  // [K, C / G, R, S] -> packed [weight_floats()], of blocks begin..end
  void pack_weights(const float* weight, const WeightLayout& layout, float* packed, int64_t begin, int64_t end) const;

  int64_t tasks() const { return groups_ * stretches() * row_blocks_ * parts_; }
  int64_t scratch_floats() const {
    return planes_.floats(divide_up(most_channels_, chunks_)) + sums_blocks_ * block_sums_ + planes_.line_floats() +
           layout_.columns.result;
  }
  // Writes the shares of tasks begin..end of result [N, filters, ...], zeros of dead filters included. start: [filters]
  // or null.
  void run(const float* operand, const float* weights, float* result, const float* start, int64_t begin, int64_t end,
           float* scratch) const;

 private:
  struct List {  // the operands of a block: a stretch of operands_ and channels_
    int64_t first, count;
  };
  struct Block {  // filters that share a list
    int filters;
    int32_t filter[kMaxFilters];
    List list;
    int64_t cuts;    // in cuts_: where in the list each chunk of channels begins
    int64_t weight;  // where its packed weights begin: [class][channel][tap][filter]
  };
  // turned: all four classes of the input gradient at stride 2 as one. whole: its tile is the whole plane.
  enum class Window { none, step1, whole, step2, turned };
  struct Class {  // the outputs of one class of rows and one class of columns (core/conv_axes.h)
    const AxisClass *rows, *columns;
    std::vector<int32_t> tap;      // r * S + s, in ascending order of
    std::vector<int32_t> offset;   // where it reads, in floats from the output's position
    std::vector<TileGrid> grid;    // [rows of a block]: the tiles of one filter
    Window window;                 // which of microkernels_window.h compute it
    bool by_row[kMaxFilters + 1];  // [filters]: tiles end where a row ends, so nothing is computed between rows
  };
  struct Stretch {  // operands of a few groups, and the blocks that read them
    int64_t place, end_place, block, end_block;
  };
  struct Pass {  // what one task works on
    int64_t chunk;
    PlaneBlock in;
    LaneRuns out;  // LaneAxis::images: where its results lie
    const float *x, *weights, *start;
    float *result, *sums;
    int64_t result_image;       // floats from one image of the result to the next
    const float* zeros;         // one row
    const Block *first, *last;  // the first is computed when x is in no cache yet; there ends the last
  };

  void run_task(const float* operand, float* result, int64_t task, bool follows, Pass pass, float* scratch,
                float* lines) const;
  void cut_lists();
  std::pair<int64_t, int64_t> chunk(const Stretch& s, int64_t i) const {
    const int64_t count = s.end_place - s.place;
    return {s.place + count * i / chunks_, s.place + count * (i + 1) / chunks_};
  }
  void cut_rows(int64_t threads);
  int64_t images_that_fit(int64_t threads) const;
  bool pays_by_row(const AxisClass& columns, int filters) const;
  void add_shared(int64_t group);
  void add_own();
  List add_list(const std::vector<int32_t>& operands);
  void find_channels();
  void share_blocks();
  void compute(const Block& block, const Pass& pass) const;
  void tiles(const Block& block, const ConvTile& tile, int64_t vectors, float* const* y, bool prefetch) const;
  void add_taps(Class& c) const;
  void add_classes();
  void find_window(Class& c) const;
  bool turns_window() const;
  Microkernels::Conv own_kernel(const Class& c, int64_t height, int64_t width) const;
  TileGrid grid_of(const Class& c, int64_t rows) const;
  void pack_block(const Block& block, const float* weight, const WeightLayout& layout, float* packed) const;
  void own_tiles(ConvTile tile, const Class& c, int64_t rows, float* y) const;
  void unpack_pixels(const Block& block, const Pass& pass) const;
  void unpack_images(const Block& block, const Pass& pass) const;
  void write_zeros(int32_t filter, const Pass& pass) const;
  bool forward() const { return direction_ == kForward; }
  int64_t stretches() const { return static_cast<int64_t>(stretches_.size()); }
  int64_t result_pixels() const { return layout_.rows.result * layout_.columns.result; }

  const Direction direction_;
  const bool shared_;
  const ConvShape shape_;
  const MaskTable mask_;
  const LaneAxis lane_axis_;
  const Microkernels& kernels_;
  PackedPlanes planes_;
  const PlaneLayout& layout_;
  std::vector<Class> classes_;
  std::vector<Stretch> stretches_;
  int64_t most_channels_ = 0;                 // of a stretch
  std::vector<int32_t> dead_;                 // dead filters: their results are zeros
  std::vector<int32_t> operands_, channels_;  // the lists, and the offsets of their packed planes
  std::vector<Block> blocks_;
  int64_t group_images_, groups_;  // images (or bands of them) of a group, which are computed together
  int64_t block_rows_, row_blocks_, parts_;
  // Where the planes of all channels of a stretch would fill L2 with few rows: they are packed a chunk at a time, and
  // the sums of all filters wait in memory.
  int64_t chunks_ = 1;
  std::vector<int32_t> cuts_;
  int64_t list_filters_;  // the most filters that share a list
  int64_t class_floats_, block_sums_, sums_blocks_ = 1, weight_floats_ = 0;
  bool stores_in_place_;
  std::vector<int32_t> cells_;  // LaneAxis::images: [result rows of a block][columns] -> cell of the sums
};

}  // namespace prunekernels
