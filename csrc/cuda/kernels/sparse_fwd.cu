// sparse_fwd and sparse_grad_input: one launch for each class of outputs, with the window that its taps form, if any.
#include "core/conv_axes.h"
#include "cuda/kernels/sparse_conv.h"
#include "cuda/kernels/sparse_correlation.cuh"

namespace prunekernels {
namespace {

constexpr int64_t kMostOffset = (int64_t{1} << 31) - 1;
constexpr size_t kMostClasses = 64;

template <int kR, int kS, int kResults>
__global__ void __launch_bounds__(kSparseThreads, 2)
    sparse_fwd_kernel(const float* x, const float* weight, const float* bias, float* y, SparseClass p) {
  SparseBlock<kR, kS, kResults>(p, x, weight).run(bias, y);
}
template <int kR, int kS, int kResults>
__global__ void __launch_bounds__(kSparseThreads, 2)
    sparse_grad_input_kernel(const float* dy, const float* weight, float* dx, SparseClass p) {
  SparseBlock<kR, kS, kResults>(p, dy, weight).run(nullptr, dx);
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The taps of an axis, sorted by the position they read.
std::vector<Tap> sorted(const AxisClass& axis) {
  std::vector<Tap> taps = axis.taps;
  std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) { return a.at < b.at; });
  return taps;
}
bool neighbours(const std::vector<Tap>& taps) {
  return !taps.empty() && taps.back().at - taps.front().at == static_cast<int64_t>(taps.size()) - 1;
}

// How the outputs of a class are cut into tiles.
struct Cut {
  SparseTile tile;
  int64_t patch_rows, staged;
  int64_t tiles_down, tiles_across, tiles;
};

// A class of rows and a class of columns.
struct ClassPlan {
  const AxisClass &rows, &columns;
  std::vector<Tap> down, across;
  int64_t step_row, step_column, low_row = 0, low_column = 0, span_row = 0, span_column = 0;
  int64_t spread_row = 1, spread_column = 1;
  bool window;
  Cut cut{};  // staged 0: no tile fits

  ClassPlan(const Axis& row_axis, const Axis& column_axis, const AxisClass& r, const AxisClass& c, int64_t images,
            int64_t image_floats)
      : rows(r),
        columns(c),
        down(sorted(r)),
        across(sorted(c)),
        step_row(row_axis.step),
        step_column(column_axis.step) {
    if (!down.empty()) low_row = down.front().at, span_row = down.back().at - low_row;
    if (!across.empty()) low_column = across.front().at, span_column = across.back().at - low_column;
    if (is(1, 1))
      std::swap(step_row, spread_row), std::swap(step_column, spread_column);  // what lies between is not read
    window = step_row == 1 && step_column == 1 && neighbours(down) && neighbours(across) && has_window();
    choose(images, image_floats);
  }

  bool has_window() const { return is(3, 3) || is(1, 1) || is(2, 2) || is(2, 1) || is(1, 2); }
  bool is(size_t r, size_t s) const { return down.size() == r && across.size() == s; }

  SparseTile tile(int across_log2, int down_log2, int64_t patch_rows) const {
    const int pieces = kWarp >> (across_log2 + down_log2);
    const auto reads = [](int64_t outputs, int64_t step, int64_t span) {
      return static_cast<int>(std::min((outputs - 1) * step + span + 1, int64_t{1} << 20));
    };
    const int r = reads(patch_rows << down_log2, step_row, span_row);
    const int c = reads(int64_t{kPatch} << across_log2, step_column, span_column);
    if (static_cast<int64_t>(r) * c * pieces > static_cast<int64_t>(kSparseShared)) return {};
    return window ? SparseTile::in_vectors(across_log2, down_log2, pieces, r, c)
                  : SparseTile::in_cells(across_log2, down_log2, pieces, r, c, static_cast<int>(step_row),
                                         static_cast<int>(step_column));
  }
  size_t shared_bytes(const SparseTile& t, int64_t steps) const {
    const int count = static_cast<int>(steps);
    if (!window) return SparseRooms<0, 0, 4>(t.cells, count).bytes();
    return is(3, 3) ? SparseRooms<3, 3, 4>(t.cells, count).bytes() : SparseRooms<2, 2, 4>(t.cells, count).bytes();
  }
  int64_t steps_that_fit(const SparseTile& t) const {
    int64_t steps = t.cells ? kMostStaged : 0;
    while (steps && shared_bytes(t, steps) > kSparseShared) steps /= 2;
    return steps;
  }

  void choose(int64_t images, int64_t image_floats) {
    constexpr int64_t kWork = 2000;  // the work of a tile in one step, in cells copied, if 5 of 32 kernels are live
    int64_t least = 0;
    for (int a = 0; 1 << a <= kWarp; ++a)
      for (int d = 0; 1 << (a + d) <= kWarp; ++d)
        for (int64_t patch_rows = kPatch; patch_rows >= (window ? kPatch : 1); patch_rows /= 2) {
          const int64_t pieces = kWarp >> (a + d);
          if (pieces > 1 && (pieces >= 2 * images || pieces * image_floats > kMostOffset)) continue;
          Cut c{tile(a, d, patch_rows), patch_rows, 0, 0, 0, 0};
          c.staged = steps_that_fit(c.tile);
          c.tiles_down = divide_up(rows.count, patch_rows << d);
          c.tiles_across = divide_up(columns.count, kPatch << a);
          c.tiles = c.tiles_down * c.tiles_across * divide_up(images, pieces);
          const int64_t cost = c.tiles * (kWork * (patch_rows + 1) / (kPatch + 1) + c.tile.copied());
          if (c.staged && (!cut.staged || cost < least)) cut = c, least = cost;
        }
  }
};

struct Correlation {
  Axis rows, columns;
  int64_t images, taps, image_floats;  // of the operand

  Correlation(const ConvShape& shape, bool forward) : images(shape.N), taps(std::max(shape.R, shape.S)) {
    const ConvShape s = fold_pixelwise(shape);
    rows = forward ? forward_axis(s, 0) : grad_input_axis(s, 0);
    columns = forward ? forward_axis(s, 1) : grad_input_axis(s, 1);
    image_floats = (forward ? s.C : s.K) * rows.operand * columns.operand;
  }

  // The plans of all classes; empty if these kernels do not serve one of them.
  std::vector<ClassPlan> plans() const {
    std::vector<ClassPlan> all;
    const size_t classes = rows.classes.size() * columns.classes.size();
    if (taps > kSparseTaps || classes > kMostClasses || image_floats > kMostOffset) return {};
    for (const AxisClass& r : rows.classes)
      for (const AxisClass& c : columns.classes) {
        all.emplace_back(rows, columns, r, c, images, image_floats);
        if (!all.back().cut.staged) return {};
      }
    return all;
  }
};

// One convolution, or input gradient, on its way to the device.
struct CorrelationLaunch {
  bool forward;
  const float *operand, *weight, *bias;
  float* result;
  const SparseConv& conv;
  cudaStream_t stream;

  const ConvShape& shape() const { return conv.shape; }
  const ResultLists& lists() const { return forward ? conv.lists->forward() : conv.lists->grad_input(); }
  int64_t operands() const { return forward ? shape().C : shape().K; }
  int64_t results() const { return forward ? shape().K : shape().C; }

  SparseClass describe(const Correlation& c, const ClassPlan& plan, int64_t parts) const {
    const auto as_int = [](int64_t n) { return static_cast<int>(n); };
    const SparseTile& t = plan.cut.tile;
    const int32_t* words = conv.device_words;
    SparseClass p{t,
                  as_int(shape().N),
                  as_int(operands()),
                  as_int(results()),
                  as_int(c.rows.operand),
                  as_int(c.columns.operand),
                  as_int(c.rows.result),
                  as_int(c.columns.result),
                  as_int(plan.rows.count),
                  as_int(plan.columns.count),
                  as_int(plan.rows.first),
                  as_int(plan.columns.first),
                  as_int(plan.rows.every),
                  as_int(plan.columns.every),
                  as_int(plan.step_row),
                  as_int(plan.step_column),
                  as_int(plan.low_row),
                  as_int(plan.low_column),
                  as_int(plan.spread_row),
                  as_int(plan.spread_column),
                  FastDivide(static_cast<uint32_t>(lists().blocks * parts)),
                  FastDivide(static_cast<uint32_t>(plan.cut.tiles_across)),
                  FastDivide(static_cast<uint32_t>(plan.cut.tiles_down)),
                  words + lists().order,
                  words + lists().begin,
                  reinterpret_cast<const SparseStep*>(words + lists().steps),
                  forward ? conv.filter_stride : conv.channel_stride,
                  forward ? conv.channel_stride : conv.filter_stride,
                  as_int(forward ? shape().K : shape().channels_per_group()),
                  as_int(plan.cut.staged),
                  as_int(plan.cut.patch_rows),
                  1,
                  as_int(plan.down.size()),
                  as_int(plan.across.size()),
                  {},
                  {},
                  {},
                  {},
                  {}};
    if (p.every_column == 1)
      for (const int wide : {4, 2})
        if (p.vector == 1 && p.result_columns % wide == 0 && reinterpret_cast<uintptr_t>(result) % (4 * wide) == 0)
          p.vector = wide;
    for (int i = 0; i < p.taps_down; ++i) {
      p.row_at[i] = as_int(plan.down[i].at - plan.low_row) * t.pitch;
      p.row_weight[i] = as_int(plan.down[i].index * shape().S * conv.tap_stride);
    }
    for (int i = 0; i < p.taps_across; ++i) {
      const int at = as_int(plan.across[i].at - plan.low_column);
      p.column_at[i] = at % t.phases * t.phase_pitch + at / t.phases;
      p.column_weight[i] = as_int(plan.across[i].index * conv.tap_stride);
    }
    if (plan.window)
      for (int t = 0; t < p.taps_down * p.taps_across; ++t)
        p.tap_weight[t] = p.row_weight[t / p.taps_across] + p.column_weight[t % p.taps_across];
    return p;
  }

  template <int kR, int kS, int kResults>
  cudaError_t launch_blocks(const SparseClass& p, int64_t tiles) const {
    const LaunchShape shape{dim3(static_cast<uint32_t>(tiles * p.blocks.by)), dim3(kSparseThreads),
                            SparseRooms<kR, kS, kResults>(p.tile.cells, p.staged).bytes()};
    if (forward) return launch(sparse_fwd_kernel<kR, kS, kResults>, shape, stream, operand, weight, bias, result, p);
    return launch(sparse_grad_input_kernel<kR, kS, kResults>, shape, stream, operand, weight, result, p);
  }
  template <int kR, int kS>
  cudaError_t launch_class(const SparseClass& p, int64_t tiles, int64_t parts) const {
    return parts == 1 ? launch_blocks<kR, kS, 4>(p, tiles) : launch_blocks<kR, kS, 2>(p, tiles);
  }
  cudaError_t launch_class(const Correlation& correlation, const ClassPlan& plan) const {
    const int64_t tiles = plan.cut.tiles, parts = lists().blocks * tiles < 2 * conv.multiprocessors ? 2 : 1;
    if (lists().blocks * tiles > kMostOffset) return cudaErrorInvalidValue;
    const SparseClass p = describe(correlation, plan, parts);
    if (!plan.window) return launch_class<0, 0>(p, tiles, parts);
    if (plan.is(3, 3)) return launch_class<3, 3>(p, tiles, parts);
    if (plan.is(1, 1)) return launch_class<1, 1>(p, tiles, parts);
    if (plan.is(2, 2)) return launch_class<2, 2>(p, tiles, parts);
    if (plan.is(2, 1)) return launch_class<2, 1>(p, tiles, parts);
    return launch_class<1, 2>(p, tiles, parts);
  }

  cudaError_t run() const {
    const Correlation correlation(shape(), forward);
    if (shape().N * results() * correlation.rows.result * correlation.columns.result == 0) return cudaSuccess;
    const std::vector<ClassPlan> plans = correlation.plans();
    if (plans.empty()) return cudaErrorInvalidValue;
    for (const ClassPlan& plan : plans) {
      const cudaError_t status = launch_class(correlation, plan);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
};

}  // namespace

cudaError_t launch_sparse_fwd(const float* x, const float* weight, const float* bias, float* y, const SparseConv& conv,
                              cudaStream_t stream) {
  return CorrelationLaunch{true, x, weight, bias, y, conv, stream}.run();
}

cudaError_t launch_sparse_grad_input(const float* dy, const float* weight, float* dx, const SparseConv& conv,
                                     cudaStream_t stream) {
  return CorrelationLaunch{false, dy, weight, nullptr, dx, conv, stream}.run();
}

bool sparse_correlation_serves(const ConvShape& s) {
  return s.K * s.channels_per_group() * s.taps() <= kMostOffset && !Correlation(s, true).plans().empty() &&
         !Correlation(s, false).plans().empty();
}

}  // namespace prunekernels
