// Host code of igemm.h: which problems are served, the choice of tiles, and the kernel parameters.
#include <algorithm>

#include "core/conv_axes.h"
#include "cuda/kernels/igemm.h"
#include "cuda/kernels/igemm_grad_launch.cuh"

namespace prunekernels {
namespace {

constexpr int64_t kMaxSide = 1 << 14, kMaxPixels = 1 << 30, kMaxWeights = INT32_MAX, kMaxChannels = 1 << 28;
constexpr int64_t kMaxTile = 128;                // result channels
constexpr int64_t kMinSteps = 8;                 // of a split; with fewer, filling and draining the pipeline shows
constexpr int64_t kMaxPartialFloats = 16 << 20;  // of all slices together, unless one alone is larger
constexpr int64_t kMaxSplits = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool axis_served(const ConvShape& s, int axis, int64_t in, int64_t out, int64_t taps) {
  return in >= 0 && out >= 0 && taps >= 1 && s.stride[axis] >= 1 && s.stride[axis] <= kMaxStride &&
         s.padding[axis] >= 0 && s.dilation[axis] >= 1 && in + 2 * s.padding[axis] <= kMaxSide &&
         taps * s.dilation[axis] <= kMaxSide && out <= kMaxSide;
}

// An AxisClass of core/conv_axes.h, its taps as an arithmetic progression.
AxisWalk walk_of(const AxisClass& c) {
  AxisWalk walk{};
  walk.first = static_cast<int32_t>(c.first), walk.every = static_cast<int32_t>(c.every);
  walk.count = static_cast<int32_t>(c.count), walk.taps = static_cast<int32_t>(c.taps.size());
  if (walk.taps >= 1) {
    walk.tap = static_cast<int32_t>(c.taps[0].index);
    walk.at = static_cast<int32_t>(c.taps[0].at);
  }
  if (walk.taps >= 2) {
    walk.tap_step = static_cast<int32_t>(c.taps[1].index) - walk.tap;
    walk.at_step = static_cast<int32_t>(c.taps[1].at) - walk.at;
  }
  return walk;
}

void set_axis(const ConvShape& shape, int axis, bool grad_input, AxisWalk* walks, ConvolveParams* p) {
  const Axis a = grad_input ? grad_input_axis(shape, axis) : forward_axis(shape, axis);
  p->step[axis] = static_cast<int32_t>(a.step);
  p->classes[axis] = static_cast<int32_t>(a.classes.size());
  for (size_t i = 0; i < a.classes.size(); ++i) walks[i] = walk_of(a.classes[i]);
}

int64_t element_bytes(Element element) { return 16 / vector_channels(element); }

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool whole_vectors_apart(const void* data, int64_t channels, Element element) {
  return aligned(data) && channels % vector_channels(element) == 0;
}

}  // namespace

bool list_is_vectors(const int32_t* index, int64_t live, int64_t channels, Element element) {
  const int64_t vector = vector_channels(element);
  if (live % vector != 0 || channels % vector != 0) return false;
  if (!index) return true;
  for (int64_t i = 0; i < live; i += vector) {
    if (index[i] % vector != 0) return false;
    for (int64_t j = 1; j < vector; ++j)
      if (index[i + j] != index[i] + j) return false;
  }
  return true;
}

bool igemm_serves(const ConvShape& s) {
  return s.G == 1 && axis_served(s, 0, s.H, s.P, s.R) && axis_served(s, 1, s.W, s.Q, s.S) &&
         s.N * (s.H + 2 * s.padding[0] + s.R * s.dilation[0]) * (s.W + 2 * s.padding[1] + s.S * s.dilation[1]) <=
             kMaxPixels &&
         s.N * (s.P + s.R * s.dilation[0]) * (s.Q + s.S * s.dilation[1]) <= kMaxPixels && s.R <= kMaxTaps &&
         s.S <= kMaxTaps && s.C <= kMaxChannels && s.K <= kMaxChannels &&
         (packed_count(s.K) + kMaxTile) * s.taps() * (packed_count(s.C) + kMaxTile) <= kMaxWeights;
}

namespace {

// Estimates in cycles of a multiprocessor's quarter for each mma of 16 x 8 x 16, not measured yet.
//   elements, vectors   instructions of the main loop that nvcc 13.0 makes for sm_90a, bf16, by loader; one a cycle
//   mma                 4 at the rate of wgmma on sm_90, of which mma.sync reaches about 60 %; smaller tiles move more
//                       for each product
// units: products of a block, in those of a 64 x 32 tile. filling: blocks that give a multiprocessor 8 warps, below
// which it waits for memory.
struct TileCost {
  IgemmTile tile;
  double elements, vectors, mma;
  int units, filling;

  double block(bool by_vectors) const { return units * std::max(by_vectors ? vectors : elements, mma); }
};
constexpr TileCost kTileCosts[] = {{IgemmTile::m128n128, 7.8, 5.0, 6.5, 8, 1},
                                   {IgemmTile::m128n64, 11.2, 5.3, 7.1, 4, 2},
                                   {IgemmTile::m64n32, 27.8, 15.5, 7.1, 1, 2}};
constexpr TileCost kWarpgroupCost{IgemmTile::w128n128, 5.4, 2.9, 4.4, 8, 2};

IgemmTile cheapest_tile(int64_t pixels, int64_t channels, int multiprocessors, bool vectors, bool large, int64_t widest,
                        bool warpgroups) {
  const TileCost* best = nullptr;
  double least = 0;
  const auto consider = [&](const TileCost& t) {
    const int64_t blocks =
        ceil_div(pixels, tile_pixels(t.tile)) * std::max<int64_t>(1, ceil_div(channels, tile_channels(t.tile)));
    const double time = std::max<int64_t>(t.filling, ceil_div(blocks, multiprocessors)) * t.block(vectors);
    if (!best || time < least) best = &t, least = time;
  };
  for (const TileCost& t : kTileCosts)
    if ((large || t.tile != IgemmTile::m128n128) && (tile_channels(t.tile) <= widest || t.tile == IgemmTile::m64n32))
      consider(t);
  if (warpgroups) consider(kWarpgroupCost);
  return best->tile;
}

}  // namespace

IgemmTile igemm_tile(int64_t pixels, int64_t channels, bool vectors, int multiprocessors, bool warpgroups) {
  return cheapest_tile(pixels, channels, multiprocessors, vectors, true, INT64_MAX, warpgroups);
}

IgemmTile block_sparse_tile(int64_t pixels, int64_t channels, bool vectors, int64_t mask_block, int multiprocessors) {
  return cheapest_tile(pixels, channels, multiprocessors, vectors, false, mask_block, false);
}

bool loads_vectors(const void* data, const ChannelView& view, Element element) {
  return view.vectors && whole_vectors_apart(data, view.channels, element);
}

cudaError_t convolve_params(const IgemmArgs& args, bool grad_input, bool listed, ConvolveParams* p) {
  const ConvShape& s = args.shape;
  ConvShape ungrouped = s;
  ungrouped.G = 1, ungrouped.C = (grad_input ? args.to : args.from).channels;
  ungrouped.K = (grad_input ? args.from : args.to).channels;
  if (!igemm_serves(ungrouped) || !aligned(args.weight) || (listed && !args.lists.first)) return cudaErrorInvalidValue;
  *p = {};
  p->operand = args.operand, p->weight = args.weight, p->bias = args.bias, p->result = args.result;
  p->from_index = args.from.index, p->to_index = args.to.index, p->to_slot = args.to.slot;
  p->list_first = args.lists.first, p->list_vectors = args.lists.chunks;
  p->images = static_cast<int32_t>(s.N);
  p->operand_rows = static_cast<int32_t>(grad_input ? s.P : s.H);
  p->operand_columns = static_cast<int32_t>(grad_input ? s.Q : s.W);
  p->pixel_bytes = static_cast<int32_t>(args.from.channels * element_bytes(args.element));
  p->result_rows = static_cast<int32_t>(grad_input ? s.H : s.P);
  p->result_columns = static_cast<int32_t>(grad_input ? s.W : s.Q);
  p->result_channels = static_cast<int32_t>(args.to.channels);
  p->from_live = static_cast<int32_t>(args.from.live), p->to_live = static_cast<int32_t>(args.to.live);
  p->from_listed = args.from.index ? p->from_live : 0;
  p->kernel_columns = static_cast<int32_t>(s.S);
  p->packed_channels = static_cast<int32_t>(packed_count(args.from.live));
  p->filter_elements = static_cast<int32_t>(s.taps()) * p->packed_channels;
  p->wide_stores = whole_vectors_apart(args.result, args.to.channels, args.element);
  set_axis(s, 0, grad_input, p->rows, p);
  set_axis(s, 1, grad_input, p->columns, p);
  return cudaSuccess;
}

GradWeightPlan plan_grad_weight(const ConvShape& s, Element element, int64_t live_filters, int64_t live_channels,
                                int multiprocessors) {
  const int64_t columns = s.taps() * packed_count(live_channels), pixels = s.N * s.P * s.Q;
  const bool large = live_filters > 64 && columns > 64;
  const int64_t side = large ? 128 : 64, resident = large ? 2 : 4;
  const int64_t tiles = std::max<int64_t>(1, ceil_div(live_filters, side) * ceil_div(columns, side));
  const int64_t chunks = ceil_div(pixels, 8 * vector_channels(element) / 2);
  const int64_t wanted = ceil_div(resident * multiprocessors, tiles);
  const int64_t slice = live_filters * columns;
  const int64_t affordable = std::max<int64_t>(1, kMaxPartialFloats / std::max<int64_t>(1, slice));
  const int64_t splits = std::max<int64_t>(1, std::min({wanted, chunks / kMinSteps, affordable, kMaxSplits}));
  return {large ? GradWeightTile::m128n128 : GradWeightTile::m64n64, splits, splits * slice};
}

cudaError_t grad_weight_params(const IgemmGradWeightArgs& args, bool listed, GradWeightParams* p) {
  ConvShape s = args.shape;
  s.G = 1, s.C = args.channels.channels, s.K = args.filters.channels;
  if (!igemm_serves(s) || args.splits < 1 || !aligned(args.partial) || (listed && !args.lists.first))
    return cudaErrorInvalidValue;
  *p = {};
  p->grad_out = args.grad_out, p->x = args.x, p->partial = args.partial;
  p->filter_index = args.filters.index, p->channel_index = args.channels.index;
  p->list_first = args.lists.first, p->list_vectors = args.lists.chunks;
  p->images = static_cast<int32_t>(s.N);
  p->out_rows = static_cast<int32_t>(s.P), p->out_columns = static_cast<int32_t>(s.Q);
  p->in_rows = static_cast<int32_t>(s.H), p->in_columns = static_cast<int32_t>(s.W);
  p->out_bytes = static_cast<int32_t>(s.K * element_bytes(args.element));
  p->in_bytes = static_cast<int32_t>(s.C * element_bytes(args.element));
  p->filters = static_cast<int32_t>(args.filters.live), p->channels = static_cast<int32_t>(args.channels.live);
  p->packed_channels = static_cast<int32_t>(packed_count(args.channels.live));
  p->kernel_rows = static_cast<int32_t>(s.R), p->kernel_columns = static_cast<int32_t>(s.S);
  p->kernel_taps = static_cast<int32_t>(s.taps());
  for (int axis = 0; axis < 2; ++axis) {
    p->stride[axis] = static_cast<int32_t>(s.stride[axis]);
    p->padding[axis] = static_cast<int32_t>(s.padding[axis]);
    p->dilation[axis] = FastDivide(static_cast<uint32_t>(s.dilation[axis]));
  }
  return cudaSuccess;
}

}  // namespace prunekernels
