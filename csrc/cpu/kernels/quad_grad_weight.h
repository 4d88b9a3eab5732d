// Weight gradient that skips blocks of kernels, NHWC and bfloat16: for four filters at a time (a quad), the dot
// products of their output gradients with the channels that any of them reads, shifted by each tap. Live channels of a
// few rows, or of a few images, are copied into planes. Partial gradients are floats. One group.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "core/tile_lists.h"
#include "cpu/kernels/pixel_planes.h"

namespace prunekernels {

class QuadGradWeight {
 public:
  // filters, channels: the mask's live ones; valid as long as this is.
  QuadGradWeight(const ConvShape& shape, const MaskTable& mask, const ChannelList& filters, const ChannelList& channels,
                 int64_t threads);

  int64_t partial_floats() const { return static_cast<int64_t>(lists_.chunks.size()) * taps_ * kQuad; }
  int64_t scratch_words() const {
    return (x_.elements() + x_.line_elements() + (filters_.live + 1) * grad_plane_ + grad_line() + 1) / 2;
  }
  // A block is a few rows of an image, or a few whole images. Partial gradients of disjoint blocks add up.
  int64_t blocks() const { return blocks_.count(); }
  // Adds the gradient from blocks first..end to partial.
  void run(const uint16_t* x, const uint16_t* grad, int64_t first, int64_t end, float* partial,
           uint32_t* scratch) const;
  // Writes filters begin..end of grad_weight, [K, R, S, C] in memory: scale times the sum of `count` partial gradients,
  // which lie one after the other, and zeros.
  void write(const float* partial, int64_t count, const float* scale, uint16_t* grad_weight, int64_t begin,
             int64_t end) const;

 private:
  int64_t grad_line() const { return std::max(Q_, PixelPlanes::kLine) * filters_.live + kPixelBlock; }
  void pack_grad(const uint16_t* grad, const PixelBlock& block, uint16_t* planes, uint16_t* line) const;
  // Calls visit(first channel of the list, how many, where their products begin) for the tiles of a quad's list.
  template <typename Visit>
  void each_tile(int64_t quad, Visit visit) const;

  const QuadKernels& kernels_;
  const MaskTable mask_;
  const ChannelList &filters_, &channels_;
  const int64_t P_, Q_, taps_;
  const TileLists lists_;              // quads of filters, channels
  const std::vector<int32_t> places_;  // of filters in the planes of the output's gradient
  PixelPlanes x_;
  PixelBlocks blocks_;
  int64_t grad_plane_;           // elements of a packed plane of the output's gradient
  std::vector<int64_t> offset_;  // by tap, r * S + s
};

}  // namespace prunekernels
