// One axis, rows or columns, of a convolution over pixels: which operands its results read.
//
// The results of phase a are a, a + phases.size(), a + 2 * phases.size(), ...; forward there is one phase. The i-th of
// them reads the gathered operands i * stride + offset, one for each tap of the phase, and gathered operand l is
// operand l * step - padding. Backward, along an axis of stride s, results that lie s apart read their neighbouring
// operands through the same taps, which are every s-th or less: s phases, each a convolution of stride 1.
#pragma once

#include <cstdint>
#include <vector>

#include "core/conv_shape.h"
#include "cpu/kernels/gather_scatter.h"
#include "cpu/kernels/pixel_kernels.h"

namespace prunekernels {

struct PixelAxis {
  struct Tap {
    int64_t index, offset;
  };
  struct Phase {
    std::vector<Tap> taps;  // by ascending offset
    int64_t results;
  };

  // axis: 0 of rows, 1 of columns. Forward, results are outputs; backward, they are inputs.
  PixelAxis(const ConvShape& shape, int axis, bool forward);

  int64_t phase_count() const { return static_cast<int64_t>(phases.size()); }
  int64_t steps() const { return phases[0].results; }  // no phase has more results
  // How many gathered operands `count` results of every phase read, the first one from `low` on.
  int64_t reach(int64_t count) const { return (count - 1) * stride + high - low + 1; }

  // The gathered operands first..first + count of a row of pixels; zeros in the padding.
  void gather(const PixelKernels& kernels, const ChannelList& list, const uint16_t* row, int64_t first, int64_t count,
              uint16_t* to, int64_t to_pixel) const;

  int64_t operand, result, stride, step, padding;
  int64_t spacing;    // between the offsets of a phase
  int64_t low, high;  // of all offsets
  std::vector<Phase> phases;
};

// If each output pixel reads the input pixel at its own place alone: all pixels become one row of one image.
bool flatten(const ConvShape& shape, PixelAxis& rows, PixelAxis& columns, int64_t& images);

}  // namespace prunekernels
