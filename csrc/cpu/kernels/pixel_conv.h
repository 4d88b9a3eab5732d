// Convolution over pixels: the direct plan for NHWC and bfloat16. Live channels of a few rows are gathered once, close
// together; tiles of pixels times live filters are computed from them, and each pixel's results go to their places.
// One group. Blocks of results read all operands (the direct plan), or some of them (sparse): then kernels that work in
// steps are not used, since runs of pairs may have any length.
//
// The input gradient is the same with input and output exchanged: results are dealt out to phases by the taps they read
// (pixel_axis.h), and the pixels of a tile are neighbours within a phase.
//
// Rows of few pixels would make small tiles, so there the inputs of each pixel are copied once more, under all taps: in
// such patches the pixels of a tile may be any.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/conv_shape.h"
#include "core/mask_table.h"
#include "core/result_blocks.h"
#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_axis.h"
#include "cpu/kernels/pixel_kernels.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

// A list of channels of which none is dead.
struct EveryChannel {
  explicit EveryChannel(int64_t channels);
  ChannelList list() const {
    const auto channels = static_cast<int64_t>(index.size());
    return {index.data(), index.data(), bits.data(), channels, channels};
  }

  std::vector<int32_t> index;
  std::vector<uint64_t> bits;
};

class PixelConv {
 public:
  enum Direction { kForward, kGradInput };
  static bool serves(const ConvShape& shape) { return shape.G == 1; }

  // filters, channels: the live ones; valid as long as this is. mask: null if no kernel between them is dead.
  PixelConv(Direction direction, const ConvShape& shape, const MaskTable* mask, ResultBlocks blocks,
            const ChannelList& filters, const ChannelList& channels, int64_t threads);

  int64_t width() const { return width_; }  // of all results, with what fills up the last block
  int64_t place(int64_t i) const { return spread_ ? live_.index[i] : i; }  // of the i-th live result in them
  int64_t weight_words() const { return words_; }
  // [K, R, S, C] in memory -> packed [weight_words()], in packs() pieces: those from begin to end. scratch:
  // [pack_scratch()]
  int64_t packs() const { return forward_ ? static_cast<int64_t>(blocks_.size()) : pairs_; }
  void pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end, uint16_t* scratch) const;
  int64_t pack_scratch() const;

  int64_t tasks() const { return tasks_; }
  int64_t scratch_elements() const { return gathered_elements() + patch_elements() + result_elements(); }
  // Writes the task's share of the result, zeros of dead channels included. start: float [width()], zeros for
  // kGradInput.
  void run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result, int64_t task,
           uint16_t* scratch) const;

 private:
  // What a block reads by the taps of a phase of rows and a phase of columns: runs of `pairs` pairs that lie side by
  // side in a gathered row. Those of a row of taps are one run if their pixels are neighbours and the block reads all
  // pairs.
  struct Part {
    int64_t words;  // from the block's first weight to theirs
    int64_t first_run, runs, pairs;
  };
  struct Block : ResultBlock {
    int64_t words;       // where its weights begin
    int64_t first_part;  // its parts: [row phases][column phases]
  };
  struct Tile {
    const uint16_t* x;
    uint16_t* y;
    int64_t part;  // of each block's
    int64_t pixels;
  };
  struct Span {
    uint16_t* to;
    int64_t pixels;
  };
  // Tiles to compute, and where their results go, which are scattered together.
  struct Work {
    const uint32_t* weights;
    const float* start;
    uint16_t* results;
    int64_t step;  // of the kernels
    std::vector<Tile> tiles;
    std::vector<Span> spans;
    int64_t pixels = 0;  // of the spans
  };

  void take(ResultBlocks blocks, int64_t taps);
  void plan_rows(int64_t threads);
  void plan_patches(int64_t taps, int64_t threads);
  void list_taps(int64_t columns);
  void add_parts(const ResultBlock& block);
  void add_patch(const ResultBlock& block);
  bool is_whole(const ResultBlock& block) const { return block.listed() == pairs_; }
  void gather_rows(const int32_t* filters, int64_t count, const ChannelList& list, const uint16_t* weight, uint16_t* to,
                   int64_t to_tap) const;
  void pack_forward(const uint16_t* weight, uint32_t* packed, const Block& block, uint16_t* scratch) const;
  void pack_backward(const uint16_t* weight, uint32_t* packed, int64_t pair, uint16_t* scratch) const;
  int64_t common_run() const;
  // From the gathered pixel under the first result of some rows to the one under the last.
  int64_t positions(int64_t rows) const { return (rows - 1) * columns_.reach(block_columns_) + block_columns_; }
  int64_t cost(int64_t pixels) const;
  int64_t window_elements() const { return rows_.reach(block_rows_) * pitch_; }
  int64_t gathered_elements() const { return images_at_once_ * window_elements() + most_pixels_ * tile_pixel_; }
  int64_t patch_elements() const { return patch_pixels_ * tile_pixel_; }
  int64_t result_elements() const { return result_pixels_ * y_pixel_ + kPixelBlock; }

  void gather(const uint16_t* image, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
              uint16_t* to) const;
  void run_rows(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered, Work& work) const;
  void run_patches(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered, Work& work) const;
  void add_row(const uint16_t* gathered, int64_t row_phase, int64_t first, int64_t count, uint16_t* to,
               Work& work) const;
  void add_joined_rows(const uint16_t* gathered, int64_t rows, uint16_t* to, Work& work) const;
  uint16_t* add_span(uint16_t* to, int64_t pixels, int64_t room, Work& work) const;
  void finish(Work& work) const;

  const bool forward_;
  const ChannelList &in_, &live_;  // of the operand and of the result
  // Whether results are those of all channels, dead ones zeros, since that makes no more of them: then they are written
  // in place.
  const bool spread_;
  const EveryChannel every_;
  const ChannelList out_;        // of the results: the live ones, or all
  const PixelKernels& kernels_;  // those of tiles only if every block reads all operands
  const std::optional<MaskTable> mask_;
  PixelAxis rows_, columns_;
  int64_t images_, width_;
  int64_t most_pixels_;    // of a tile
  int64_t pairs_, pixel_;  // of channels, with zeros behind them; elements of a gathered pixel
  int64_t run_pixels_;     // runs have multiples of this
  bool reads_in_place_, writes_in_place_, joins_rows_ = false;
  int64_t y_pixel_;                                                  // between results
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_;  // in results of a phase
  int64_t pitch_;                                                    // elements of a gathered row
  int64_t patch_pixels_ = 0, images_at_once_ = 1;                    // of a task of patches
  int64_t tasks_, tile_pixel_, result_pixels_;  // between the pixels of a tile; that are scattered together
  std::vector<int64_t> order_;                  // of the taps in packed weights
  std::vector<int32_t> runs_;                   // of the parts: where they start, in gathered rows or in a patch
  std::vector<int32_t> patch_taps_;             // where those of a patch lie in gathered rows,
  size_t patch_run_;                            // so many side by side
  std::vector<int32_t> listed_;                 // pairs of the blocks
  std::vector<int32_t> place_;  // [pairs][blocks], from a block's first pair to this one, or -1; empty if all read all
  std::vector<Block> blocks_;
  std::vector<Part> parts_;
  int64_t words_ = 0;
};

}  // namespace prunekernels
