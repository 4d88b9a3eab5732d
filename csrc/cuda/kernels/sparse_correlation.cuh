// One class of outputs (core/conv_axes.h) of a convolution over live kernels: the forward pass, or a residue class of
// the input gradient.
//   result[n, k, first + every * o] = start[k] + sum over c, t of w[k, c, t] * operand[n, c, step * o + at[t]]
// with operands c of the list of k and taps t.
// A block computes a tile of 512 outputs (lanes x 4 x 4, of one image or of several small ones) for 32 result channels,
// or for 16 where there are few blocks. Each of its 8 warps computes all outputs for an eighth of the channels. The
// block goes through the steps of its list: the operand's cells come into shared memory, three stages deep, and a warp
// works on live kernels only. Outputs beyond the planes and images beyond the last are computed from zeros and not
// stored.
//   windows (kR x kS neighbouring taps, step 1)  a thread has 4 x 4 neighbouring outputs and holds the cells that they
//                                                read in registers; weights are staged too
//   any taps (kR = 0)                            a thread's outputs lie a row of lanes apart; weights come through L1
#pragma once

#include "cuda/kernels/sparse_class.cuh"

namespace prunekernels {

template <int kR, int kS, int kResults>
class SparseBlock {
  static constexpr bool kWindow = kR > 0;
  static constexpr int kParts = kBlockResults / (kSparseWarps * kResults);
  static constexpr int kTaps = kR * kS, kWeightPitch = SparseRooms<kR, kS, kResults>::kWeightPitch;

 public:
  PK_DEVICE SparseBlock(const SparseClass& p, const float* operands, const float* weight)
      : p(p),
        rooms(p.tile.cells, p.staged),
        source(0),
        steps(rooms.steps * 4),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        operand(operands) {
    uint32_t tile = p.blocks(blockIdx.x);
    const int block = static_cast<int>(blockIdx.x - tile * p.blocks.by);
    list = block / kParts;
    first_result = (block % kParts * kSparseWarps + warp) * kResults;
    const uint32_t down = p.tiles_across(tile);
    const uint32_t group = p.tiles_down(down);
    column = static_cast<int>(tile - down * p.tiles_across.by) * kPatch * p.tile.across();
    row = static_cast<int>(down - group * p.tiles_down.by) * p.patch_rows * p.tile.down();
    image = static_cast<int>(group) * p.tile.images;
    operand += image * static_cast<int64_t>(p.operands) * p.operand_rows * p.operand_columns;
    lane_column = lane & (p.tile.across() - 1);
    lane_row = lane >> p.tile.across_log2 & (p.tile.down() - 1);
    lane_image = lane >> (p.tile.across_log2 + p.tile.down_log2);
#pragma unroll
    for (int f = 0; f < kKernels; ++f) kernels[f] = kernel_of(kWindow ? lane / kKernelLanes % kResults : f, weight);
  }

  PK_DEVICE void run(const float* bias, float* result) {
    fill_source();
    start(bias);
    const int end = p.taps_down * p.taps_across > 0 ? p.begin[list + 1] : p.begin[list];
    for (int first = p.begin[list]; first < end; first += kListSteps) {
      const int count = min(kListSteps, end - first);
      __syncthreads();  // all threads have read the previous steps
      if (static_cast<int>(threadIdx.x) < count)
        steps.set_vector(threadIdx.x * kStepWords, reinterpret_cast<const int4*>(p.steps)[first + threadIdx.x]);
      __syncthreads();
      pipeline(count);
    }
    store(result);
  }

 private:
  PK_DEVICE void fill_source() {
    for (int i = threadIdx.x; i < p.tile.cells; i += kSparseThreads) {
      const SparseTile::Cell cell = p.tile.cell(i);
      const int r = p.spread_row * (p.step_row * row + cell.row) + p.low_row;
      const int c = p.spread_column * (p.step_column * column + cell.column) + p.low_column;
      const bool inside = cell.column >= 0 && r >= 0 && r < p.operand_rows && c >= 0 && c < p.operand_columns &&
                          image + cell.image < p.images;
      const int plane = p.operand_rows * p.operand_columns;
      source.set(i, inside ? cell.image * p.operands * plane + r * p.operand_columns + c : -1);
    }
  }

  PK_DEVICE void start(const float* bias) {
#pragma unroll
    for (int f = 0; f < kResults; ++f) {
      const int k = result_of(f);
      const float value = bias && k >= 0 && k < p.results ? bias[k] : 0.f;
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
#pragma unroll
        for (int j = 0; j < kPatch; ++j) sums[f][i][j] = value;
    }
  }

  // The f-th result channel of this warp; its complement if it is dead; p.results if there is none.
  PK_DEVICE int result_of(int f) const {
    const int i = list * kBlockResults + first_result + f;
    return i < p.results ? p.order[i] : p.results;
  }
  PK_DEVICE const float* kernel_of(int f, const float* weight) const {
    const int k = result_of(f);
    return k < 0 ? weight : weight + k % p.weight_results * p.result_stride;
  }

  PK_DEVICE void pipeline(int count) {
    const int stages = (count + p.staged - 1) / p.staged;
    int to = 0, from = 0;
    for (int s = 0; s < kSparseStages - 1; ++s, ++to) {
      if (s < stages) stage(s * p.staged, count, to);
      cp_async_commit();
    }
    for (int s = 0; s < stages; ++s) {
      cp_async_wait<kSparseStages - 2>();
      __syncthreads();  // stage s has arrived, and all threads are done with stage s - 1
      if (s + kSparseStages - 1 < stages) stage((s + kSparseStages - 1) * p.staged, count, to);
      cp_async_commit();
      compute(s * p.staged, min(count, (s + 1) * p.staged), from);
      to = to == kSparseStages - 1 ? 0 : to + 1;
      from = from == kSparseStages - 1 ? 0 : from + 1;
    }
  }

  PK_DEVICE Shared<float> stage_at(int buffer) const {
    return Shared<float>((rooms.stages + buffer * rooms.stage_words) * 4);
  }
  PK_DEVICE SparseStep step(int i) const {
    const int4 s = steps.get_vector<int4>(i * kStepWords);
    return {s.x, s.y, static_cast<uint32_t>(s.z), 0};
  }

  // Starts the copies of the operands, and of this warp's weights, of steps first, first + 1, ...
  PK_DEVICE void stage(int first, int count, int buffer) const {
    const Shared<float> to = stage_at(buffer);
    const int here = min(p.staged, count - first);
    if (here & 4) stage_cells<4>(to, first);
    if (here & 2) stage_cells<2>(to + (here & 4) * p.tile.cells, first + (here & 4));
    if (here & 1) stage_cells<1>(to + (here & 6) * p.tile.cells, first + (here & 6));
    if constexpr (kWindow) stage_weights(to + rooms.weights, first, here);
  }
  template <int kCount>
  PK_DEVICE void stage_cells(const Shared<float>& to, int first) const {
    const int plane = p.operand_rows * p.operand_columns;
    const float* planes[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) planes[e] = operand + step(first + e).operand * plane;
    for (int i = threadIdx.x; i < p.tile.cells; i += kSparseThreads) {
      const int from = source.get(i);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        cp_async<4>(to.address(e * p.tile.cells + i), planes[e] + max(from, 0), from >= 0);
    }
  }
  // kKernelLanes lanes copy a kernel; a warp has kResults kernels in each of up to 4 steps.
  PK_DEVICE void stage_weights(const Shared<float>& to, int first, int here) const {
    const int kernel = lane / kKernelLanes, e = kernel / kResults, f = kernel % kResults;
    if (e >= here) return;
    const SparseStep s = step(first + e);
    if (!(s.live >> (first_result + f) & 1)) return;
    const float* from = kernels[0] + s.weight_operand * p.operand_stride;
    const int at = ((e * kSparseWarps + warp) * kResults + f) * kWeightPitch;
#pragma unroll
    for (int i = 0; i < kTaps; i += kKernelLanes) {
      const int t = i + lane % kKernelLanes;
      if (t < kTaps) cp_async<4>(to.address(at + t), from + p.tap_weight[t], true);
    }
  }

  PK_DEVICE void compute(int first, int end, int buffer) {
    const Shared<float> x = stage_at(buffer) + lane_cell();
    for (int i = first; i < end; ++i) {
      const SparseStep s = step(i);
      const uint32_t live = s.live >> first_result & ((1 << kResults) - 1);
      if (live == 0) continue;
      if constexpr (kWindow)
        add_window(x + (i - first) * p.tile.cells,
                   stage_at(buffer) + rooms.weights + ((i - first) * kSparseWarps + warp) * kResults * kWeightPitch,
                   live);
      else
        add_taps(x + (i - first) * p.tile.cells, s.weight_operand, live);
    }
  }
  PK_DEVICE int lane_cell() const {
    constexpr int kApart = kWindow ? kPatch : 1;
    return lane_image * p.tile.image_pitch + kApart * (lane_row * p.step_row * p.tile.pitch + lane_column);
  }

  PK_DEVICE void add_window(const Shared<float>& x, const Shared<float>& weights, uint32_t live) {
    constexpr int kRows = kPatch + kR - 1, kColumns = kS > 1 ? kPatch + 2 : kPatch;
    float window[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4 four = x.get_vector<float4>(i * p.tile.pitch);
      window[i][0] = four.x, window[i][1] = four.y, window[i][2] = four.z, window[i][3] = four.w;
      if constexpr (kS > 1) {
        const float2 two = x.get_vector<float2>(i * p.tile.pitch + kPatch);
        window[i][4] = two.x, window[i][5] = two.y;
      }
    }
#pragma unroll
    for (int f = 0; f < kResults; ++f) {
      if (!(live >> f & 1)) continue;
      float w[kWeightPitch];
#pragma unroll
      for (int t = 0; t < kTaps / 4 * 4; t += 4) {
        const float4 four = weights.get_vector<float4>(f * kWeightPitch + t);
        w[t] = four.x, w[t + 1] = four.y, w[t + 2] = four.z, w[t + 3] = four.w;
      }
#pragma unroll
      for (int t = kTaps / 4 * 4; t < kTaps; ++t) w[t] = weights.get(f * kWeightPitch + t);
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
#pragma unroll
        for (int i = 0; i < kPatch; ++i)
#pragma unroll
          for (int j = 0; j < kPatch; ++j) sums[f][i][j] += w[t] * window[i + t / kS][j + t % kS];
    }
  }

  PK_DEVICE void add_taps(const Shared<float>& x, int weight_operand, uint32_t live) {
    const int row_step = p.tile.down() * p.step_row * p.tile.pitch;
    const int64_t of_operand = weight_operand * p.operand_stride;
    for (int r = 0; r < p.taps_down; ++r)
      for (int s = 0; s < p.taps_across; ++s) {
        float window[kPatch][kPatch];
#pragma unroll
        for (int i = 0; i < kPatch; ++i)
#pragma unroll
          for (int j = 0; j < kPatch; ++j)
            if (i < p.patch_rows)
              window[i][j] = x.get(p.row_at[r] + p.column_at[s] + i * row_step + (j << p.tile.across_log2));
#pragma unroll
        for (int f = 0; f < kResults; ++f) {
          if (!(live >> f & 1)) continue;
          const float w = kernels[f][of_operand + p.row_weight[r] + p.column_weight[s]];
#pragma unroll
          for (int i = 0; i < kPatch; ++i)
#pragma unroll
            for (int j = 0; j < kPatch; ++j)
              if (i < p.patch_rows) sums[f][i][j] += w * window[i][j];
        }
      }
  }

  PK_DEVICE void store(float* result) const {
    if (image + lane_image >= p.images) return;
    const int o_row = row + (kWindow ? kPatch * lane_row : lane_row), row_apart = kWindow ? 1 : p.tile.down();
    const int o_column = column + (kWindow ? kPatch * lane_column : lane_column);
#pragma unroll
    for (int f = 0; f < kResults; ++f) {
      const int k = result_of(f);
      if (k == p.results) continue;
      float* plane = result + ((image + lane_image) * static_cast<int64_t>(p.results) + (k < 0 ? ~k : k)) *
                                  p.result_rows * p.result_columns;
#pragma unroll
      for (int i = 0; i < kPatch; ++i) {
        const int r = o_row + i * row_apart;
        if (i < p.patch_rows && r < p.rows)
          store_row(plane + static_cast<int64_t>(p.first_row + r * p.every_row) * p.result_columns + p.first_column,
                    o_column, sums[f][i]);
      }
    }
  }
  PK_DEVICE void store_row(float* to, int c, const float (&values)[kPatch]) const {
    if constexpr (kWindow) {
      if (p.vector == 4) {
        if (c < p.columns) *reinterpret_cast<float4*>(to + c) = {values[0], values[1], values[2], values[3]};
        return;
      }
      if (p.vector == 2) {
        if (c < p.columns) *reinterpret_cast<float2*>(to + c) = {values[0], values[1]};
        if (c + 2 < p.columns) *reinterpret_cast<float2*>(to + c + 2) = {values[2], values[3]};
        return;
      }
    }
    const int apart = kWindow ? 1 : p.tile.across();
#pragma unroll
    for (int j = 0; j < kPatch; ++j)
      if (c + j * apart < p.columns) to[(c + j * apart) * p.every_column] = values[j];
  }

  const SparseClass& p;
  const SparseRooms<kR, kS, kResults> rooms;
  const Shared<int32_t> source, steps;
  const int warp, lane;
  const float* operand;  // from the tile's first image on
  static constexpr int kKernels = kWindow ? 1 : kResults, kKernelLanes = kWarp / (kMostStaged * kResults);
  const float* kernels[kKernels];  // weights of operand 0 for each result; with windows, of the result this lane stages
  int list, first_result;          // the warp's results begin at first_result of the list's
  int image, row, column;          // where the tile begins
  int lane_image, lane_row, lane_column;
  float sums[kResults][kPatch][kPatch];
};

}  // namespace prunekernels
