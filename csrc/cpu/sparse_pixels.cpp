#include "cpu/sparse_pixels.h"

#include <utility>

#include "core/result_blocks.h"
#include "core/tile_lists.h"
#include "cpu/kernels/pixel_conv.h"
#include "cpu/kernels/pixel_grad_weight.h"
#include "cpu/kernels/quad_conv.h"
#include "cpu/kernels/quad_grad_weight.h"
#include "cpu/pixel_runs.h"

namespace prunekernels {
namespace {

// Clock cycles a pixel: of a pair of operands that 32 results read; of 32 channels that are copied, or turned.
constexpr double kPair = 1, kCopy = 5, kTurn = 9;
// The gradient of the weight: of a kernel's tap; of a partial sum that is read and written, of a block of pixels.
constexpr double kProduct = 1.0 / 64, kPartialSum = 0.25;
// Multiply-adds of the vendor's convolution in the time in which a channel of a pixel is turned.
constexpr double kMultiplyAddsPerTurn = 12;

// How much more is computed where rows are padded and vectors filled up.
double positions_per_pixel(const ConvShape& s, bool forward) {
  const double gap = (forward ? s.padding[1] : s.S - 1 - s.padding[1]) > 0 ? 1 : 0;
  const auto Q = static_cast<double>(forward ? s.Q : s.W);
  return (Q + gap) / Q;
}

double channels_of(const MaskTable& mask) { return static_cast<double>(mask.in_count() + mask.out_count()) / 32; }

// Whether the results, in blocks of 32 and 16, read few enough operands.
bool prefers_blocks(const ConvShape& s, const MaskTable& mask, const TileLists& quads, const ResultBlocks& blocks,
                    bool forward) {
  const auto taps = static_cast<double>(s.taps()), listed = static_cast<double>(quads.chunks.size());
  const double by_quads = taps * kPair * listed / 8 * positions_per_pixel(s, forward) + kTurn * channels_of(mask);
  return taps * kPair * blocks.cost + kCopy * channels_of(mask) < by_quads;
}

bool prefers_tiles(const ConvShape& s, const MaskTable& mask, const QuadGradWeight& quads,
                   const PixelGradWeight& tiles) {
  const auto pixels = static_cast<double>(s.N * s.out_pixels());
  const auto products = [](int64_t floats) { return kProduct * static_cast<double>(floats); };
  const double by_quads = products(quads.partial_floats()) * positions_per_pixel(s, true) + kTurn * channels_of(mask);
  const int64_t floats = tiles.computed_floats();
  const double sums = kPartialSum * static_cast<double>(floats * tiles.blocks()) / pixels;
  return products(floats) + sums + kCopy * channels_of(mask) < by_quads;
}

at::Tensor run(PixelConv::Direction direction, const ConvCall<MaskTable>& call, const at::Tensor& operand,
               const at::Tensor& weight, const at::Tensor* bias, at::IntArrayRef size) {
  const ConvShape& s = call.shape;
  const MaskTable& mask = call.mask;
  const bool forward = direction == PixelConv::kForward;
  const PixelLists lists(mask);
  const ChannelList &results = forward ? lists.filters : lists.channels,
                    &operands = forward ? lists.channels : lists.filters;
  TileLists quads = forward ? filter_tile_lists(mask, kQuad, 2) : channel_tile_lists(mask, kQuad, 2);
  ResultBlocks blocks = cut_into_blocks(quads, results.live, operands.live, s.taps());
  if (prefers_blocks(s, mask, quads, blocks, forward)) {
    const bool exact = blocks.kernels(operands.live) == mask[kLivePairs];
    const PixelConv conv(direction, s, exact ? nullptr : &mask, std::move(blocks), lists.filters, lists.channels,
                         at::get_num_threads());
    return run_conv(conv, operand, weight, bias, results, size);
  }
  const QuadConv conv(forward, s, mask, std::move(quads), lists.filters, lists.channels, at::get_num_threads());
  return run_conv(conv, operand, weight, bias, results, size);
}

}  // namespace

bool sparse_pixels_serve(const PlanCase& c) {
  return c.dtype == at::kBFloat16 && c.format == at::MemoryFormat::ChannelsLast && c.shape.G == 1 &&
         !c.mask[kPairsFull];
}

double listed_share(const PlanCase& c) {
  const MaskTable& mask = c.mask;
  const int64_t filters = c.direction == Direction::grad_input ? 2 : kQuad;
  const int64_t channels = c.direction == Direction::grad_weight ? 1 : 2 * kQuad / filters;
  int64_t listed = 0;
  for (int64_t i = 0; i < mask.out_count(); i += filters)
    for (int64_t word = 0; word < pair_words(mask.channels_per_group()); ++word) {
      uint32_t read = 0;
      for (int64_t j = i; j < std::min(i + filters, mask.out_count()); ++j)
        read |= mask.pairs(mask.out_index()[j])[word];
      if (channels > 1) read = (read | read >> 1) & 0x55555555;
      if (channels > 2) read = (read | read >> 2) & 0x11111111;
      listed += __builtin_popcount(read) * filters * channels;
    }
  return static_cast<double>(listed) / static_cast<double>(mask.out_count() * mask.in_count());
}

double sparse_pixels_cost(const PlanCase& c) {
  const ConvShape& s = c.shape;
  const auto all = static_cast<double>(s.N * s.out_pixels() * s.taps() * c.mask.out_count() * c.mask.in_count());
  const auto turned =
      static_cast<double>(s.N * (s.in_pixels() * c.mask.in_count() + s.out_pixels() * c.mask.out_count()));
  const auto packed = static_cast<double>(s.taps() * c.mask[kLivePairs]);
  return kDirectCost * all * listed_share(c) + kMultiplyAddsPerTurn * turned + kMultiplyAddsPerElement * packed;
}

at::Tensor sparse_pixels_forward(const ConvCall<MaskTable>& call, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias) {
  const ConvShape& s = call.shape;
  return run(PixelConv::kForward, call, x, weight, bias ? &*bias : nullptr, {s.N, s.K, s.P, s.Q});
}

at::Tensor sparse_pixels_grad_input(const ConvCall<MaskTable>& call, const at::Tensor& grad_out,
                                    const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  return run(PixelConv::kGradInput, call, grad_out, weight, nullptr, {s.N, s.C, s.H, s.W});
}

at::Tensor sparse_pixels_grad_weight(const ConvCall<MaskTable>& call, const at::Tensor& grad_out, const at::Tensor& x,
                                     const at::Tensor& weight, const OptionalTensor& scale) {
  const ConvShape& s = call.shape;
  const PixelLists lists(call.mask);
  const QuadGradWeight quads(s, call.mask, lists.filters, lists.channels, at::get_num_threads());
  const PixelGradWeight tiles(s, &call.mask, lists.filters, lists.channels);
  if (prefers_tiles(s, call.mask, quads, tiles)) return run_grad_weight(tiles, grad_out, x, weight, scale);
  return run_grad_weight(quads, grad_out, x, weight, scale);
}

}  // namespace prunekernels
