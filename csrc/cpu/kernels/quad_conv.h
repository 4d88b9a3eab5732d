// Convolution that skips blocks of kernels: the sparse plan for NHWC and bfloat16. Live channels of a few rows, or of a
// few images, are copied into planes; four results at a time (a quad) are computed from the pairs of channels that any
// of them reads, and go back to their pixels. One group.
//
// The input gradient is the same with input and output exchanged; see conv_axes.h.
#pragma once

#include <cstdint>
#include <vector>

#include "core/mask_table.h"
#include "core/tile_lists.h"
#include "cpu/kernels/pixel_planes.h"

namespace prunekernels {

class QuadConv {
 public:
  // lists: of quads of results, pairs of operands. filters, channels: the mask's live ones; valid as long as this is.
  QuadConv(bool forward, const ConvShape& shape, const MaskTable& mask, TileLists lists, const ChannelList& filters,
           const ChannelList& channels, int64_t threads);

  int64_t quads() const { return lists_.tiles(); }
  int64_t width() const { return quads() * kQuad; }  // of all results, with what fills up the last quad
  static int64_t place(int64_t i) { return i; }      // of the i-th live result in them
  int64_t weight_words() const { return static_cast<int64_t>(lists_.chunks.size()) * taps_ * kQuad; }
  // [K, R, S, C] in memory -> packed [weight_words()], in packs() pieces: those from begin to end.
  int64_t packs() const { return (quads() + kPackQuads - 1) / kPackQuads; }
  void pack_weights(const uint16_t* weight, uint32_t* packed, int64_t begin, int64_t end, uint16_t* scratch) const;
  int64_t pack_scratch() const { return 0; }

  int64_t tasks() const { return blocks_.count(); }
  int64_t scratch_elements() const { return planes_.elements() + planes_.line_elements() + result_elements(); }
  // Writes the task's share of the result, zeros of dead channels included. start: float [width()].
  void run(const uint16_t* operand, const uint32_t* weights, const float* start, uint16_t* result, int64_t task,
           uint16_t* scratch) const;

 private:
  struct Class {  // of results that are reached by the same taps
    const AxisClass *rows, *columns;
    std::vector<int32_t> tap, offset;  // r * S + s, and its place in a plane
    int64_t weights;                   // where those of its taps begin
  };
  struct Tile {  // vectors of positions
    int64_t first, count;
  };

  static constexpr int64_t kPackQuads = 8;  // whose channels fill a cache line

  void pack(const uint16_t* weight, uint32_t* packed, int64_t quad, int32_t begin, int32_t end) const;
  int64_t result_pairs() const { return (quads() * 2 + kQuadLanes - 1) / kQuadLanes * kQuadLanes; }
  int64_t result_elements() const {
    return (result_pairs() + 1) * kQuadVectors * kQuadLanes * 2 * 2;  // as planes, and as pixels
  }
  void compute(const Class& c, const Tile& tile, const uint32_t* planes, const uint32_t* weights, const float* start,
               uint32_t* sums) const;
  void write(const Class& c, const Tile& tile, const PixelBlock& block, const uint32_t* sums, uint16_t* pixels,
             uint16_t* result) const;
  void write_zeros(const Class& c, const PixelBlock& block, uint16_t* result) const;
  template <typename Visit>
  void each_run(const Class& c, const Tile& tile, const PixelBlock& block, Visit visit) const;
  uint16_t* result_pixel(const Class& c, const PixelBlock& block, int64_t image, int64_t row, int64_t column,
                         uint16_t* result) const;

  const QuadKernels& kernels_;
  const MaskTable mask_;
  const bool forward_;
  const ChannelList &in_, &out_;  // of the operand and of the result
  const int64_t taps_;
  const TileLists lists_;
  PixelPlanes planes_;
  PixelBlocks blocks_;
  std::vector<int32_t> pairs_;  // of all lists, as distances in planes
  std::vector<Class> classes_;
  bool writes_in_place_;
};

}  // namespace prunekernels
