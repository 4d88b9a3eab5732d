// sparse_grad_weight: the partial sums of sparse_dots.cuh, then the gradient from them.
#include "cuda/kernels/sparse_class.cuh"
#include "cuda/kernels/sparse_conv.h"
#include "cuda/kernels/sparse_dots.cuh"

namespace prunekernels {
namespace {

constexpr int64_t kMostPartials = 8 << 20;  // floats of all partial gradients, unless one split alone has more
constexpr int64_t kBlocksPerProcessor = 4;

template <int kR, int kS>
__global__ void __launch_bounds__(kSparseThreads, 2)
    sparse_grad_weight_kernel(const float* x, const float* dy, float* partial, SparseDots p) {
  DotBlock<kR, kS>(p, x, dy).run(partial);
}

struct SparseSum {
  int64_t rows, live_pairs;  // K * ceil(C / G / 32)
  int64_t filter_stride, channel_stride, tap_stride;
  int splits, taps, channels, words;  // channels, words: of a filter
};

// dw[k, c, t] = scale[k] * sum over splits of partial[split, pair, t], 0 where (k, c) is dead or the scale is 0.
// A warp owns 32 channels of a filter, that is one word of `pairs`; a kernel's pair is the word's rank plus the live
// bits below its own. Neighbouring lanes write neighbouring elements, in either layout of the weight.
__global__ void __launch_bounds__(kSparseThreads)
    sparse_grad_weight_sum_kernel(const float* __restrict__ partial,  // [splits, live_pairs, taps]
                                  const uint32_t* __restrict__ pairs, const int32_t* __restrict__ rank,
                                  const float* __restrict__ scale, float* __restrict__ dw, SparseSum p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int64_t k = row / p.words;
  const int first = static_cast<int>(row - k * p.words) * 32, lane = threadIdx.x % kWarp;
  const uint32_t live = pairs[row];
  const float factor = scale ? scale[k] : 1.f;
  const int count = min(32, p.channels - first);
  const bool channels_inside = p.channel_stride < p.tap_stride;
  float* const to = dw + k * p.filter_stride + first * p.channel_stride;
  for (int e = lane; e < p.taps * (channels_inside ? 32 : count); e += kWarp) {
    const int c = channels_inside ? lane : e / p.taps, t = channels_inside ? e / 32 : e % p.taps;
    if (c >= count) continue;
    float sum = 0.f;
    if (live >> c & 1 && factor != 0.f) {
      const float* from = partial + static_cast<int64_t>(rank[row] + __popc(live & ((1u << c) - 1))) * p.taps + t;
#pragma unroll 4
      for (int s = 0; s < p.splits; ++s) sum += from[s * p.live_pairs * p.taps];
      sum *= factor;
    }
    to[c * p.channel_stride + t * p.tap_stride] = sum;
  }
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How outputs are cut into tiles.
struct DotPlan {
  ConvShape s;  // folded; of stride 1 where the kernel is 1x1
  int64_t spread_row = 1, spread_column = 1;
  bool window;
  SparseTile x{};
  int64_t rows = 0, jobs = 0;  // jobs 0: nothing fits
  int grad_view_pitch = 0, grad_cells = 0;

  explicit DotPlan(const ConvShape& shape) : s(fold_pixelwise(shape)) {
    if (s.taps() == 1) {  // copies only the pixels that are read, not those between them
      std::swap(s.stride[0], spread_row), std::swap(s.stride[1], spread_column);
      window = true;
    } else {
      window = s.R == 3 && s.S == 3 && s.stride[0] == 1 && s.stride[1] == 1 && s.dilation[0] == 1 && s.dilation[1] == 1;
    }
    int64_t least = 0;
    for (int log2 = 0; log2 <= 3; ++log2)
      for (int64_t height = 4; height >= 1; --height)
        for (int64_t part = kBlockJobs; part >= kWarp / kJobLanes; part /= 2) consider(log2, height, part, least);
  }

  int64_t row_tiles() const { return divide_up(s.P, rows); }
  int64_t tiles_across() const { return divide_up(s.Q, kPatch * x.across()); }
  int64_t tiles() const { return divide_up(s.N * row_tiles(), x.images) * tiles_across(); }
  int64_t tap_groups() const { return window ? 1 : divide_up(s.taps(), kSomeTaps); }

  void consider(int across_log2, int64_t height, int64_t part, int64_t& least) {
    DotPlan cut = *this;
    cut.rows = height, cut.jobs = part;
    const int64_t r = (height - 1) * s.stride[0] + (s.R - 1) * s.dilation[0] + 1;
    const int64_t c = ((kPatch << across_log2) - 1) * s.stride[1] + (s.S - 1) * s.dilation[1] + 1;
    const int views = kJobLanes >> across_log2, rows_read = static_cast<int>(r), columns_read = static_cast<int>(c);
    if (std::max(r, c) >= 1 << 12 || r * c * views > static_cast<int64_t>(kSparseShared)) return;
    if (window)
      cut.x = SparseTile::in_vectors(across_log2, 0, views, rows_read, columns_read);
    else
      cut.x = SparseTile::in_cells(across_log2, 0, views, rows_read, columns_read, 1, static_cast<int>(s.stride[1])),
      cut.x.cells = odd_multiple(cut.x.cells, kJobLanes);  // a warp's jobs begin in different banks
    const int lane_words = window ? kPatch : 1;
    cut.grad_view_pitch = odd_multiple(static_cast<int>(height) * kPatch * cut.x.across(), lane_words * cut.x.across());
    cut.grad_view_pitch = (cut.grad_view_pitch + 3) / 4 * 4;
    cut.grad_cells = views * cut.grad_view_pitch;
    if (DotRooms(cut.x.cells, cut.grad_cells, static_cast<int>(part)).bytes() > kSparseShared) return;
    // In cells copied: a job's row of 32 outputs is worth about 90 of them, a tile's barriers 2000. Every part copies
    // dy.
    const int64_t dy_copied = views * height * (kPatch * cut.x.across() + 7);
    const int64_t tile = part * (cut.x.copied() + 90 * height) + kBlockFilters * dy_copied + 2000;
    const int64_t cost = cut.tiles() * tile * (kBlockJobs / part);
    if (jobs && cost >= least) return;
    x = cut.x, rows = height, jobs = part, grad_view_pitch = cut.grad_view_pitch, grad_cells = cut.grad_cells;
    least = cost;
  }

  int64_t split_tiles(const JobLists& lists, int multiprocessors) const {
    const int64_t blocks = std::max<int64_t>(1, lists.blocks * (kBlockJobs / jobs) * tap_groups());
    const int64_t wanted = divide_up(kBlocksPerProcessor * multiprocessors, blocks);
    const int64_t affordable = kMostPartials / std::max<int64_t>(1, lists.live_pairs * s.taps());
    const int64_t splits = std::clamp<int64_t>(std::min(wanted, affordable), 1, std::max<int64_t>(1, tiles()));
    return divide_up(tiles(), splits);
  }
};

bool dots_serve(const ConvShape& s, const DotPlan& plan) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  return plan.jobs && std::max(s.R, s.S) <= kSparseTaps && s.C * s.in_pixels() <= kMost &&
         s.K * s.out_pixels() <= kMost && s.N * s.P <= kMost / 8 && plan.tiles() <= kMost / 8;
}

SparseDots describe(const DotPlan& plan, const SparseConv& conv, const float* dy, int64_t split_tiles) {
  const auto as_int = [](int64_t n) { return static_cast<int>(n); };
  const ConvShape& s = plan.s;
  const JobLists& lists = conv.lists->grad_weight();
  SparseDots p{plan.x,
               as_int(plan.rows),
               plan.grad_view_pitch,
               plan.grad_cells,
               s.Q % 4 == 0 && reinterpret_cast<uintptr_t>(dy) % 16 == 0 ? 4 : 1,
               as_int(s.N),
               as_int(s.C),
               as_int(s.K),
               as_int(s.H),
               as_int(s.W),
               as_int(s.P),
               as_int(s.Q),
               as_int(s.stride[0]),
               as_int(s.stride[1]),
               as_int(-s.padding[0]),
               as_int(-s.padding[1]),
               as_int(plan.spread_row),
               as_int(plan.spread_column),
               FastDivide(static_cast<uint32_t>(plan.row_tiles())),
               FastDivide(static_cast<uint32_t>(plan.tiles_across())),
               FastDivide(static_cast<uint32_t>(kBlockJobs / plan.jobs)),
               as_int(plan.tiles()),
               as_int(split_tiles),
               as_int(plan.jobs),
               reinterpret_cast<const SparseJobs*>(conv.device_words + lists.jobs),
               lists.live_pairs,
               as_int(s.taps()),
               FastDivide(static_cast<uint32_t>(s.S)),
               {},
               {}};
  for (int64_t r = 0; r < s.R; ++r) p.row_at[r] = as_int(r * s.dilation[0]) * plan.x.pitch;
  for (int64_t c = 0; c < s.S; ++c) {
    const int at = as_int(c * s.dilation[1]);
    p.column_at[c] = at % plan.x.phases * plan.x.phase_pitch + at / plan.x.phases;
  }
  return p;
}

}  // namespace

bool sparse_serves(const ConvShape& shape) {
  return sparse_correlation_serves(shape) && dots_serve(shape, DotPlan(shape));
}

int64_t sparse_grad_weight_workspace(const SparseConv& conv) {
  const DotPlan plan(conv.shape);
  const JobLists& lists = conv.lists->grad_weight();
  if (!plan.jobs || plan.tiles() == 0) return 0;
  return divide_up(plan.tiles(), plan.split_tiles(lists, conv.multiprocessors)) * lists.live_pairs * conv.shape.taps();
}

cudaError_t launch_sparse_grad_weight(const float* x, const float* dy, const uint32_t* pairs, const float* scale,
                                      float* workspace, float* dw, const SparseConv& conv, cudaStream_t stream) {
  const ConvShape& s = conv.shape;
  const JobLists& lists = conv.lists->grad_weight();
  if (s.K * s.channels_per_group() * s.taps() == 0) return cudaSuccess;
  const DotPlan plan(s);
  if (!dots_serve(s, plan)) return cudaErrorInvalidValue;
  int64_t splits = 0;
  if (lists.live_pairs && plan.tiles()) {
    const int64_t split_tiles = plan.split_tiles(lists, conv.multiprocessors);
    splits = divide_up(plan.tiles(), split_tiles);
    const LaunchShape shape{dim3(static_cast<uint32_t>(lists.blocks * (kBlockJobs / plan.jobs)),
                                 static_cast<uint32_t>(plan.tap_groups()), static_cast<uint32_t>(splits)),
                            dim3(static_cast<uint32_t>(plan.jobs * kJobLanes)),
                            DotRooms(plan.x.cells, plan.grad_cells, static_cast<int>(plan.jobs)).bytes()};
    const auto kernel = !plan.window ? sparse_grad_weight_kernel<0, 0>
                        : s.R == 3   ? sparse_grad_weight_kernel<3, 3>
                                     : sparse_grad_weight_kernel<1, 1>;
    const cudaError_t status = launch(kernel, shape, stream, x, dy, workspace, describe(plan, conv, dy, split_tiles));
    if (status != cudaSuccess) return status;
  }
  const int64_t words = pair_words(s.channels_per_group());
  const SparseSum sum{s.K * words,
                      lists.live_pairs,
                      conv.filter_stride,
                      conv.channel_stride,
                      conv.tap_stride,
                      static_cast<int>(splits),
                      static_cast<int>(s.taps()),
                      static_cast<int>(s.channels_per_group()),
                      static_cast<int>(words)};
  return launch(sparse_grad_weight_sum_kernel,
                {dim3(static_cast<uint32_t>(divide_up(sum.rows, kSparseWarps))), dim3(kSparseThreads), 0}, stream,
                workspace, pairs, conv.device_words + lists.rank, scale, dw, sum);
}

}  // namespace prunekernels
