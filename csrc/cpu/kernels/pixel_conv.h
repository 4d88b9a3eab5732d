// Convolution over pixels: the direct plan for NHWC and bfloat16. Live channels of a few rows are gathered once, close
// together; tiles of pixels times live filters are computed from them, and each pixel's results go to their places.
// One group, whose listed filters and channels have all kernels between them.
//
// The input gradient is the same with input and output exchanged: results are dealt out to phases by the taps they read
// (pixel_axis.h), and the pixels of a tile are neighbours within a phase.
//
// Rows of few pixels would make small tiles, so there the inputs of each pixel are copied once more, under all taps: in
// such patches the pixels of a tile may be any.
#pragma once

#include <cstdint>
#include <vector>

#include "core/conv_shape.h"
#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_axis.h"
#include "cpu/kernels/pixel_kernels.h"
#include "cpu/kernels/weights.h"

namespace prunekernels {

class PixelConv {
 public:
  enum Direction { kForward, kGradInput };
  static bool serves(const ConvShape& shape) { return shape.G == 1; }

  // filters, channels: the live ones; valid as long as this is.
  PixelConv(Direction direction, const ConvShape& shape, const ChannelList& filters, const ChannelList& channels,
            int64_t threads);

  int64_t blocks() const { return blocks_; }  // of kPixelBlock results
  int64_t weight_words() const { return blocks_ * block_words(); }
  // [K, R, S, C] in memory -> packed [weight_words()], in packs() pieces: those from begin to end. scratch:
  // [pack_scratch()]
  int64_t packs() const { return forward_ ? blocks_ : pairs_; }
  void pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end, uint16_t* scratch) const;
  int64_t pack_scratch() const;

  int64_t tasks() const { return tasks_; }
  int64_t scratch_elements() const { return gathered_elements() + patch_elements() + result_elements(); }
  // Writes the task's share of the result, zeros of dead channels included. start: float [blocks() * kPixelBlock],
  // zeros for kGradInput.
  void run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result, int64_t task,
           uint16_t* scratch) const;

 private:
  // The taps of a phase of rows and a phase of columns: runs of `pairs` pairs that lie side by side in a gathered row.
  // Those of a row are one run if their pixels are neighbours.
  struct Part {
    int64_t first_tap, first_run, runs, pairs;
  };
  struct Tile {
    const uint16_t* x;
    uint16_t* y;
    const Part* part;
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
    std::vector<Tile> tiles;
    std::vector<Span> spans;
    int64_t pixels = 0;  // of the spans
  };

  void plan_rows(int64_t threads);
  void plan_patches(int64_t threads);
  void list_taps(int64_t columns);
  int64_t block_words() const { return static_cast<int64_t>(order_.size()) * pairs_ * kPixelBlock; }
  int64_t window_elements() const { return rows_.reach(block_rows_) * pitch_; }
  int64_t gathered_elements() const { return images_at_once_ * window_elements() + kMostPixels * tile_pixel_; }
  int64_t patch_elements() const { return patch_pixels_ * tile_pixel_; }
  int64_t result_elements() const { return (result_pixels_ * blocks_ + 1) * kPixelBlock; }

  void gather(const uint16_t* image, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
              uint16_t* to) const;
  void run_rows(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered, Work& work) const;
  void run_patches(const uint16_t* operand, uint16_t* result, int64_t task, uint16_t* gathered, Work& work) const;
  void add_row(const uint16_t* gathered, int64_t row_phase, int64_t first, int64_t count, uint16_t* to,
               Work& work) const;
  uint16_t* add_span(uint16_t* to, int64_t pixels, Work& work) const;
  void finish(Work& work) const;

  const PixelKernels& kernels_;
  const bool forward_;
  const ChannelList &in_, &out_;  // of the operand and of the result
  PixelAxis rows_, columns_;
  int64_t images_, pairs_, pixel_, blocks_;  // pixel_: elements of a gathered one
  int64_t most_pixels_;                      // of a tile
  bool writes_in_place_;
  int64_t y_pixel_;                                                  // between results
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_;  // in results of a phase
  int64_t pitch_;                                                    // elements of a gathered row
  int64_t patch_pixels_ = 0, images_at_once_ = 1;                    // of a task of patches
  int64_t tasks_, tile_pixel_, result_pixels_;  // between the pixels of a tile; that are scattered together
  std::vector<int64_t> order_;                  // of the taps in packed weights
  std::vector<int32_t> runs_;                   // where they start in gathered rows
  std::vector<Part> parts_;                     // [row phases][column phases]
  Part patch_{};                                // all taps, where patches have them
};

}  // namespace prunekernels
