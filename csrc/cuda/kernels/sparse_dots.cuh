// Weight gradient over live kernels: for each live pair (k, c) and tap t the dot product
//   partial[split, pair, t] = sum over the split's outputs o of dy[n, k, o] * x[n, c, step * o + at[t]]
// A block has up to 32 jobs (a channel, and up to 8 filters that read it) and computes them over a stretch of tiles. A
// tile is `rows` rows of 32 outputs: of one view, or of up to 8 narrow ones (a view is so many rows of an image). dy of
// the block's filters and the cells of x that they read lie in shared memory, two tiles deep. Eight lanes work on a
// job, each on 4 outputs of a row; a lane sums 8 filters x kTaps. At the end the eight lanes add their sums, so that
// each has those of one filter. Outputs beyond the planes count as 0.
//   windows (kR x kS taps, step 1)  a lane's outputs are neighbours; x is read in vectors, and a row serves kR rows
//   any taps (kR = 0)               a block has kSomeTaps of them; a lane's outputs lie apart
#pragma once

#include "core/sparse_lists.h"
#include "cuda/kernels/fast_divide.cuh"
#include "cuda/kernels/sparse_tile.cuh"

namespace prunekernels {

constexpr int kJobLanes = 8;
constexpr int kSomeTaps = 9;
static_assert(kJobFilters == kJobLanes && kBlockJobs * kJobLanes == kSparseThreads);

struct SparseDots {
  SparseTile x;                     // cells of a channel; its images are the views
  int rows;                         // of a view
  int grad_view_pitch, grad_cells;  // dy of a filter: [view][row][4 lanes across]
  int grad_vector;                  // outputs copied at once: 4 or 1
  int images, channels, filters;    // N, C, K
  int H, W, P, Q;
  int step_row, step_column, low_row, low_column;
  int spread_row, spread_column;  // cell i of a tile that begins with output o lies at spread * (step * o + i) + low
  FastDivide row_tiles, tiles_across, parts;  // parts: blocks that share a SparseJobs
  int tiles, split_tiles;                     // in all, of a split
  int jobs;                                   // of a part
  const SparseJobs* blocks;
  int64_t live_pairs;
  int taps;
  FastDivide taps_across;
  int row_at[kSparseTaps], column_at[kSparseTaps];  // cell that output 0 reads
};

struct DotRooms {  // where the parts of a block's shared memory begin, in words
  int cells = 0, channels, filters, stages, grads, stage_words;
  PK_HOST_DEVICE DotRooms(int x_cells, int grad_cells, int jobs)
      : channels((x_cells + 3) / 4 * 4), filters(channels + kBlockJobs), stages(filters + kBlockFilters) {
    grads = jobs * x_cells;
    stage_words = grads + kBlockFilters * grad_cells;
  }
  size_t bytes() const { return static_cast<size_t>(stages + 2 * stage_words) * 4; }
};

template <int kR, int kS>
class DotBlock {
  static constexpr bool kWindow = kR > 0;
  static constexpr int kTaps = kWindow ? kR * kS : kSomeTaps;

 public:
  PK_DEVICE DotBlock(const SparseDots& p, const float* x, const float* dy)
      : p(p),
        rooms(p.x.cells, p.grad_cells, p.jobs),
        cells(0),
        channels(rooms.channels * 4),
        filters(rooms.filters * 4),
        x(x),
        dy(dy) {
    const int block = static_cast<int>(p.parts(blockIdx.x));
    first_job = static_cast<int>(blockIdx.x - block * p.parts.by) * p.jobs;
    list = p.blocks + block;
    first_tap = static_cast<int>(blockIdx.y) * kTaps;
    job_lane = threadIdx.x % kJobLanes;
    lane_column = job_lane & (p.x.across() - 1), lane_view = job_lane >> p.x.across_log2;
  }

  PK_DEVICE void run(float* partial) {
    present = min(p.jobs, list->jobs - first_job);
    if (present <= 0) return;
    const int mine = threadIdx.x / kJobLanes;
    job = list->job + first_job + mine;
    const bool any = mine < present;
    most = __shfl_sync(0xffffffff, any ? job->filters : 0, 0);  // the warp's first job is its largest
    place = any ? mine : 0;
#pragma unroll
    for (int j = 0; j < kJobFilters; ++j) grad_at[j] = job->filter[j] * p.grad_cells;
    fill_lists();
    clear();
    const int begin = static_cast<int>(blockIdx.z) * p.split_tiles, end = min(begin + p.split_tiles, p.tiles);
    stage(begin, 0);
    cp_async_commit();
    for (int t = begin; t < end; ++t) {
      const int buffer = (t - begin) & 1;
      if (t + 1 < end) stage(t + 1, buffer ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();  // tile t has arrived
      compute(stage_at(buffer));
      __syncthreads();  // all threads have read tile t
    }
    write(partial, any);
  }

 private:
  PK_DEVICE void fill_lists() {
    for (int i = threadIdx.x; i < p.x.cells; i += blockDim.x) {
      const SparseTile::Cell cell = p.x.cell(i);
      cells.set(i, cell.column < 0 ? -1 : cell.image << 24 | cell.row << 12 | cell.column);
    }
    if (threadIdx.x < p.jobs) channels.set(threadIdx.x, list->job[first_job + threadIdx.x].channel);
    if (threadIdx.x < kBlockFilters) filters.set(threadIdx.x, list->filter[threadIdx.x]);
    __syncthreads();
  }
  PK_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < kJobFilters; ++j)
#pragma unroll
      for (int t = 0; t < kTaps; ++t) sums[j][t] = 0.f;
  }
  PK_DEVICE Shared<float> stage_at(int buffer) const {
    return Shared<float>((rooms.stages + buffer * rooms.stage_words) * 4);
  }

  struct View {
    int image, row;  // of its first output; image may be beyond the last
  };
  PK_DEVICE View view(int first, int v) const {
    const uint32_t unit = first + v, image = p.row_tiles(unit);
    return {static_cast<int>(image), static_cast<int>(unit - image * p.row_tiles.by) * p.rows};
  }

  PK_DEVICE void stage(int tile, int buffer) const {
    const uint32_t down = p.tiles_across(tile);
    const int column = static_cast<int>(tile - down * p.tiles_across.by) * kPatch * p.x.across();
    const int unit = static_cast<int>(down) * p.x.images;
    stage_x(unit, column, stage_at(buffer));
    if (p.grad_vector == 4)
      stage_grad<4>(unit, column, stage_at(buffer) + rooms.grads);
    else
      stage_grad<1>(unit, column, stage_at(buffer) + rooms.grads);
  }
  // A thread copies one cell of all channels.
  PK_DEVICE void stage_x(int unit, int column, const Shared<float>& to) const {
    const int plane = p.H * p.W;
    for (int i = threadIdx.x; i < p.x.cells; i += blockDim.x) {
      const int cell = cells.get(i);
      if (cell < 0) continue;
      const View v = view(unit, cell >> 24);
      const int r = p.spread_row * (p.step_row * v.row + (cell >> 12 & 0xfff)) + p.low_row;
      const int c = p.spread_column * (p.step_column * column + (cell & 0xfff)) + p.low_column;
      const bool inside = v.image < p.images && r >= 0 && r < p.H && c >= 0 && c < p.W;
      const float* from = x + (inside ? v.image * static_cast<int64_t>(p.channels) * plane + r * p.W + c : 0);
      for (int j = 0; j < present; ++j)
        cp_async<4>(to.address(j * p.x.cells + i), from + channels.get(j) * plane, inside);
    }
  }
  // A warp copies one filter's dy, kVector rows of 32 outputs at a time.
  template <int kVector>
  PK_DEVICE void stage_grad(int unit, int column, const Shared<float>& to) const {
    constexpr int kRowLanes = kWarp / kVector;
    const int lane = threadIdx.x % kWarp, at = lane % kRowLanes * kVector;
    const int v = at >> (p.x.across_log2 + 2), in_row = at & (kPatch * p.x.across() - 1);
    const View from = view(unit, v);
    const int plane = p.P * p.Q, q = column + in_row;
    for (int y = lane / kRowLanes; y < p.rows; y += kVector) {
      const bool inside = from.image < p.images && from.row + y < p.P && q < p.Q;
      const float* row =
          dy + (inside ? from.image * static_cast<int64_t>(p.filters) * plane + (from.row + y) * p.Q + q : 0);
      const int cell = v * p.grad_view_pitch + y * kPatch * p.x.across() + in_row;
      for (int f = threadIdx.x / kWarp; f < list->filters; f += blockDim.x / kWarp)
        cp_async<4 * kVector>(to.address(f * p.grad_cells + cell), row + filters.get(f) * plane, inside);
    }
  }

  PK_DEVICE void compute(const Shared<float>& stage) {
    const Shared<float> mine = stage + place * p.x.cells + lane_view * p.x.image_pitch;
    const Shared<float> grad = stage + rooms.grads + lane_view * p.grad_view_pitch;
    if constexpr (kWindow)
      add_windows(mine + kPatch * lane_column, grad + kPatch * lane_column);
    else
      add_taps(mine + lane_column, grad + lane_column);
  }

  PK_DEVICE static void load_row(const Shared<float>& from, float* row) {
    const float4 four = from.get_vector<float4>(0);
    row[0] = four.x, row[1] = four.y, row[2] = four.z, row[3] = four.w;
    if constexpr (kS > 1) {
      const float2 two = from.get_vector<float2>(kPatch);
      row[4] = two.x, row[5] = two.y;
    }
  }
  PK_DEVICE void add_windows(const Shared<float>& x, const Shared<float>& grad) {
    constexpr int kColumns = kS > 1 ? kPatch + 2 : kPatch;
    float window[kR][kColumns];
#pragma unroll
    for (int r = 0; r < kR - 1; ++r) load_row(x + r * p.x.pitch, window[r]);
    for (int y = 0; y < p.rows; ++y) {
      load_row(x + (y + kR - 1) * p.x.pitch, window[kR - 1]);
#pragma unroll
      for (int j = 0; j < kJobFilters; ++j) {
        if (j >= most) break;
        const float4 g = grad.get_vector<float4>(grad_at[j] + y * kPatch * p.x.across());
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          const float* w = window[t / kS] + t % kS;
          sums[j][t] += g.x * w[0];
          sums[j][t] += g.y * w[1];
          sums[j][t] += g.z * w[2];
          sums[j][t] += g.w * w[3];
        }
      }
#pragma unroll
      for (int r = 0; r < kR - 1; ++r)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) window[r][i] = window[r + 1][i];
    }
  }

  PK_DEVICE void add_taps(const Shared<float>& x, const Shared<float>& grad) {
    const int here = min(kTaps, p.taps - first_tap), apart = p.x.across();
    int at[kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int tap = first_tap + (t < here ? t : 0), r = static_cast<int>(p.taps_across(tap));
      at[t] = p.row_at[r] + p.column_at[tap - r * p.taps_across.by];
    }
    for (int y = 0; y < p.rows; ++y)
      for (int i = 0; i < kPatch; ++i) {
        float values[kTaps];
#pragma unroll
        for (int t = 0; t < kTaps; ++t)
          values[t] = t < here ? x.get(at[t] + y * p.step_row * p.x.pitch + i * apart) : 0.f;
#pragma unroll
        for (int j = 0; j < kJobFilters; ++j) {
          if (j >= most) break;
          const float g = grad.get(grad_at[j] + (y * kPatch + i) * apart);
#pragma unroll
          for (int t = 0; t < kTaps; ++t) sums[j][t] += g * values[t];
        }
      }
  }

  // Adds up over the job's lanes. In each call a lane keeps half of its filters; lane l ends with filter l.
  template <int kCount>
  PK_DEVICE void halve() {
    const bool upper = job_lane & kCount;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const float kept = upper ? sums[j + kCount][t] : sums[j][t], sent = upper ? sums[j][t] : sums[j + kCount][t];
        sums[j][t] = kept + __shfl_xor_sync(0xffffffff, sent, kCount);
      }
  }
  PK_DEVICE void write(float* partial, bool any) {
    halve<4>();
    halve<2>();
    halve<1>();
    if (!any || job_lane >= job->filters) return;
    float* to = partial + (blockIdx.z * p.live_pairs + job->pair[job_lane]) * p.taps + first_tap;
    for (int t = 0; t < kTaps; ++t)
      if (kWindow || first_tap + t < p.taps) to[t] = sums[0][t];
  }

  const SparseDots& p;
  const DotRooms rooms;
  const Shared<int32_t> cells, channels, filters;
  const float *x, *dy;
  const SparseJobs* list;
  const SparseJob* job;
  int first_job, present, first_tap, job_lane, lane_column, lane_view, most, place;
  int grad_at[kJobFilters];
  float sums[kJobFilters][kTaps];
};

}  // namespace prunekernels
