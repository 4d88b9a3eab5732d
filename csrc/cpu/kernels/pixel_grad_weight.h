// Weight gradient over pixels, NHWC and bfloat16: sums over pairs of neighbouring output pixels of their gradients
// times the inputs that a tap shifts under them. Live channels are gathered and interleaved, pair by pair; partial
// gradients are floats. One group. With a mask, tiles that no live kernel has a part in are left out (the sparse plan).
//
// Where the inputs under the taps of a row are neighbours, those of all its taps are one run of numbers, which vectors
// cut without regard to taps: an image of three channels fills them too. Or vectors hold filters, where those fill them
// better.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/conv_shape.h"
#include "core/mask_table.h"
#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_axis.h"
#include "cpu/kernels/pixel_kernels.h"

namespace prunekernels {

class PixelGradWeight {
 public:
  // filters, channels: the live ones; valid as long as this is. mask: null if no kernel between them is dead.
  PixelGradWeight(const ConvShape& shape, const MaskTable* mask, const ChannelList& filters,
                  const ChannelList& channels);

  int64_t partial_floats() const { return R_ * runs_ * out_rows_ * width_; }
  int64_t computed_floats() const;  // of those
  int64_t scratch_words() const { return x_words() + g_words() + turned_words() + 2 * gathered_words(); }
  // A block is a few rows of an image. Partial gradients of disjoint blocks add up.
  int64_t blocks() const { return images_ * row_blocks_ * column_blocks_; }
  // Adds the gradient from blocks first..end to partial.
  void run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
           uint32_t* scratch) const;
  // Writes filters begin..end of grad_weight, [K, R, S, C] in memory: scale times the sum of `count` partial gradients,
  // which lie one after the other, and zeros.
  void write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight, int64_t begin,
             int64_t end) const;

 private:
  // A block: rows of x and of the output's gradient as `lines` lines of `pairs` pairs of pixels; for kernels that work
  // in steps, what is broadcast once more, turned.
  struct Packed {
    const uint32_t *x, *g, *turned;
    int64_t lines, pairs, step;
  };

  void find_live();
  bool is_live(int64_t tile, int64_t vector) const { return live_.empty() || live_[tile * vectors_ + vector]; }
  int64_t padded(int64_t pairs) const;
  int64_t x_words() const;
  int64_t g_words() const;
  int64_t turned_words() const;
  int64_t gathered_words() const;
  void pack_grad(const uint16_t* rows, int64_t count, int64_t columns, int64_t pairs, uint32_t* to,
                 uint16_t* gathered) const;
  void pack_x(const uint16_t* image, int64_t first_row, int64_t count, int64_t first_column, int64_t columns,
              int64_t pairs, uint32_t* to, uint16_t* gathered) const;
  void turn(const uint32_t* from, int64_t lines, int64_t line, int64_t pairs, int64_t step, uint32_t* to) const;
  void multiply(const Packed& packed, float* partial) const;

  const PixelKernels& kernels_;
  const std::optional<MaskTable> mask_;
  const ChannelList &filters_, &channels_;
  PixelAxis rows_, columns_;
  int64_t images_, R_;
  int64_t runs_, run_taps_;  // of a row of taps: how many, and of how many taps each
  int64_t elements_;         // of a run: taps times live channels
  bool vectors_of_filters_;
  int64_t out_rows_;           // those that are broadcast; of kernels that work in steps, in whole halves of blocks
  int64_t broadcast_, width_;  // how many numbers multiply a vector each, and how many vectors hold, with what fills up
  int64_t g_width_, x_width_;  // words that the filters, a run's elements have for a pair of pixels
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_, pairs_;
  int64_t g_row_, x_row_;  // words of a packed row, of x with all runs
  int64_t tiles_, vectors_;
  std::vector<char> live_;  // [tiles_][vectors_ of half a block each], if there is a mask
};

}  // namespace prunekernels
