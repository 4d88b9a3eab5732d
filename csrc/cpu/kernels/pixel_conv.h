// Convolution over pixels: the direct plan for NHWC and bfloat16. Live channels of a few rows are gathered once, close
// together; tiles of pixels times live filters are computed from them, and each pixel's results go to their places.
// One group, whose listed filters and channels have all kernels between them.
//
// The input gradient is the same with input and output exchanged: results are dealt out to phases by the taps they read
// (pixel_axis.h), and the pixels of a tile are neighbours within a phase.
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

  int64_t tasks() const { return images_ * row_blocks_ * column_blocks_; }
  int64_t scratch_elements() const { return gathered_elements() + result_elements(); }
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
  struct Operands {
    const uint16_t* gathered;
    const uint32_t* weights;
    const float* start;
    uint16_t* results;
  };

  int64_t block_words() const { return static_cast<int64_t>(order_.size()) * pairs_ * kPixelBlock; }
  int64_t gathered_elements() const;
  int64_t result_elements() const {
    return (scatters_ * kMostPixels * columns_.phase_count() * blocks_ + 1) * kPixelBlock;
  }
  void run_row(const Operands& operands, int64_t row_phase, int64_t first, int64_t count, uint16_t* to) const;

  const PixelKernels& kernels_;
  const bool forward_;
  const ChannelList &in_, &out_;  // of the operand and of the result
  PixelAxis rows_, columns_;
  int64_t images_, pairs_, pixel_, blocks_;                          // pixel_: elements of a gathered one
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_;  // in results of a phase
  int64_t pitch_;                                                    // elements of a gathered row
  int64_t scatters_;                                                 // tiles whose results are scattered together
  std::vector<int64_t> order_;                                       // of the taps in packed weights
  std::vector<int32_t> runs_;                                        // where they start in gathered rows
  std::vector<Part> parts_;                                          // [row phases][column phases]
  bool writes_in_place_;
};

}  // namespace prunekernels
