// Convolutions as implicit matrix products on channels_last activations. They gather the live channels while they load
// and write the full width, zeros included, while they store, so nothing is copied before or after.
//
// clang-format off
//   igemm_fwd          y[n, p, q, k]  = bias[k] + sum over r, s, live c of x[n, h(p, r), w(q, s), c] w[k, r, s, c]
//   igemm_grad_input   gx[n, h, w, c] = sum over r, s, live k of gy[n, p(h, r), q(w, s), k] w[k, r, s, c]
//   igemm_grad_weight  gw[k, r, s, c] = sum over n, p, q of gy[n, p, q, k] x[n, h(p, r), w(q, s), c]  (fp32, in slices)
//   block_sparse_*     the same with tile lists: skips steps of the reduction in which every kernel is dead
// clang-format on
//
// The first two are one kernel (igemm_core.cuh): core/conv_axes.h makes the input gradient a forward convolution with
// the lists swapped and a class of results per residue of the stride.
//
// Least cost for N P Q pixels, L live of C channels, M live of K filters, elements of 2 bytes:
//   bytes   2 (N H W C + N P Q K) + weights: the full width is read (32-byte sectors hold live and dead channels alike)
//           and must be written. This bounds 1x1 layers under about 300 live channels.
//   flops   2 N P Q taps L M, at the rate of mma.sync (about 60 % of the wgmma rate on sm_90)
//   grad_weight   bytes 2 (N H W C + N P Q K) + 8 splits M taps L: slices are written, and read again by
//           unpack_grad_weight
// Other layers are bound by mma.sync or shared memory bandwidth (64 x 32 warp tiles use 75 % of it at full mma rate);
// with the element loader, or small tiles, by issue slots (7 to 26 instructions for each mma). A block takes at most 72
// KB of shared memory and half of the registers: two large blocks fit a multiprocessor of sm_80, sm_90 or sm_100.
// These numbers, igemm_tile() and plan_grad_weight() are estimates from instruction counts, not measured yet.
#pragma once

#include "core/conv_shape.h"
#include "cuda/kernels/stream.h"

namespace prunekernels {

// The channels of a channels_last tensor, and the list of those that take part: the positions of the list are the
// compact channels.
struct ChannelView {
  int64_t channels;  // full width, the stride of a pixel
  int64_t live;      // length of the list
  // device [live], ascending: compact -> channel (MaskTable's out_index, in_index). Null: identity
  const int32_t* index;
  // device [channels]: channel -> compact, kDead or kConstant. Read for the written tensor only. Null: identity,
  // live == channels
  const int32_t* slot;
  bool vectors;  // list_is_vectors(). Ignored for the written tensor
};

// Whether the list (host index[live]; null: identity) consists of whole aligned 16-byte runs of channels. Then the
// vector loader serves, which reads and multiplies every channel of a vector; it also needs a tensor that starts at a
// multiple of 16 bytes, else the launcher takes the element loader.
bool list_is_vectors(const int32_t* index, int64_t live, int64_t channels, Element element);

// Channels that fill 16 bytes. The innermost size of packed weights is a multiple of it; tile lists count in it.
constexpr int64_t vector_channels(Element element) { return element == Element::f32 ? 4 : 8; }

// The innermost size of packed weights and of weight gradients: live channels, rounded up to a multiple of 8.
constexpr int64_t packed_count(int64_t live) { return (live + 7) / 8 * 8; }

// Device copy of core/tile_lists.h. Tiles of the result channels, chunks of vector_channels(element) operand channels.
// Null first: no list; everything is computed.
struct DeviceTileLists {
  const int32_t* first;   // device [tiles + 1]
  const int32_t* chunks;  // device
  int64_t longest;        // TileLists::longest()
};

// Pixels x channels of a block's results.
// w128n128: by warpgroups, for elements of 2 bytes on sm_90a.
enum class IgemmTile : int32_t { m128n128, m128n64, m64n32, w128n128 };
constexpr int64_t tile_pixels(IgemmTile tile) { return tile == IgemmTile::m64n32 ? 64 : 128; }
constexpr int64_t tile_channels(IgemmTile tile) {
  return tile == IgemmTile::m128n128 || tile == IgemmTile::w128n128 ? 128 : tile == IgemmTile::m128n64 ? 64 : 32;
}

// Whether these kernels serve a problem: one group, strides up to 8, kernels up to 15 x 15, and numbers of pixels and
// of weights that 32-bit indices hold. Tensors may have more than 2^31 elements.
bool igemm_serves(const ConvShape& shape);

// The tile with the least estimated time for igemm_fwd (pixels = N P Q, channels = live filters) or igemm_grad_input
// (pixels = N H W, channels = live channels): the blocks of the busiest multiprocessor times the cost of one. vectors:
// whether the operand's list_is_vectors(); other lists cost small tiles more.
// warpgroups: whether there is w128n128.
IgemmTile igemm_tile(int64_t pixels, int64_t channels, bool vectors, int multiprocessors, bool warpgroups);
// With tile lists there is no m128n128. mask_block: result channels that share their live kernels (a mask's block
// size).
IgemmTile block_sparse_tile(int64_t pixels, int64_t channels, bool vectors, int64_t mask_block, int multiprocessors);

struct IgemmArgs {
  ConvShape shape;  // of the convolution, whatever the direction. C, K and G are not read: the views below count
  Element element;  // of operand, weight, bias and result; sums are fp32
  bool tf32;        // f32 only: tensor cores on operands rounded to tf32 (weights packed as such)
  IgemmTile tile;

  const void* operand;  // forward: x [N, H, W, from.channels]; input gradient: grad_out [N, P, Q, from.channels]
  ChannelView from;
  const void* weight;     // packed [>= to.live, R * S, packed_count(from.live)]: PackLayout::rows for the forward,
                          // PackLayout::columns for the input gradient. 16-byte aligned
  const void* bias;       // [to.channels], live and constant ones are read; null: none. Forward only
  void* result;           // forward: y [N, P, Q, to.channels]; input gradient: grad_x [N, H, W, to.channels]
  ChannelView to;         // index and slot
  DeviceTileLists lists;  // block_sparse_* only: tiles of tile_channels(tile) result channels
};

// Write the whole result: sums where live, the bias (or 0) where kConstant, 0 where dead. Never read operand channels
// that are not listed. Without pixels nothing is launched. cudaErrorInvalidValue: not served.
cudaError_t igemm_fwd(const IgemmArgs& args, cudaStream_t stream);
cudaError_t igemm_grad_input(const IgemmArgs& args, cudaStream_t stream);
cudaError_t block_sparse_fwd(const IgemmArgs& args, cudaStream_t stream);
cudaError_t block_sparse_grad_input(const IgemmArgs& args, cudaStream_t stream);

// Filters x (taps and channels) of a block's results.
enum class GradWeightTile : int32_t { m128n128, m64n64 };
constexpr int64_t tile_filters(GradWeightTile tile) { return tile == GradWeightTile::m128n128 ? 128 : 64; }

struct IgemmGradWeightArgs {
  ConvShape shape;  // C, K and G are not read
  Element element;  // of grad_out and x
  bool tf32;
  GradWeightTile tile;
  int64_t splits;  // the pixels are cut into this many ranges, one slice of partial sums each

  const void* grad_out;   // [N, P, Q, filters.channels]
  ChannelView filters;    // index and vectors
  const void* x;          // [N, H, W, channels.channels]
  ChannelView channels;   // index and vectors
  float* partial;         // [splits, filters.live, R * S, packed_count(channels.live)], 16-byte aligned
  DeviceTileLists lists;  // block_sparse_grad_weight only: tiles of tile_filters(tile) filters
};

// Tile and number of slices for a problem: enough blocks for all multiprocessors, each with at least 8 steps.
struct GradWeightPlan {
  GradWeightTile tile;
  int64_t splits;
  int64_t partial_floats;  // size of the workspace `partial`
};
GradWeightPlan plan_grad_weight(const ConvShape& shape, Element element, int64_t live_filters, int64_t live_channels,
                                int multiprocessors);

// partial[i, f, t, j] = the i-th range's share of gw[filters[f], t, channels[j]]. unpack_grad_weight adds the slices in
// a fixed order, so that results repeat bit by bit. Every entry of a live kernel is written; with lists, entries of
// skipped chunks are not, nor is the padding of the channels. No pixels: zeros. No live filter or channel: nothing is
// launched.
cudaError_t igemm_grad_weight(const IgemmGradWeightArgs& args, cudaStream_t stream);
cudaError_t block_sparse_grad_weight(const IgemmGradWeightArgs& args, cudaStream_t stream);

}  // namespace prunekernels
