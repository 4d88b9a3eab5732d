// The kernel of igemm_fwd, igemm_grad_input and both block_sparse_*:
//
//   result[pixel, to_index[n]] = bias + sum over taps and packed channels j of
//                                operand[pixel at tap, from_index[j]] weight[n, tap, j]
//
// A block owns kM pixels of one class x kN compact result channels. Of the full-width result it writes the channels
// from its first live channel up to the next block's first (the first block starts at 0, the last goes to the end), so
// each element is written once. A warp owns kWarpM x kWarpN sums. A thread loads one vector (or word) for several
// pixels and filters. Tails: pixels beyond the last are kNoPixel, channels beyond the last are zeros; neither is
// stored.
#pragma once

#include "core/mask_table.h"
#include "cuda/kernels/igemm_load.cuh"

namespace prunekernels {

constexpr int kStages = 4;        // a power of two
constexpr int kStorePadding = 8;  // elements between rows of the staged result, so that rows differ in banks

template <typename T, typename Tile>
struct ConvolveShared {
  static constexpr int kStage = (Tile::kM + Tile::kN) * kRowElements<T, Tile>;  // elements
  static constexpr int kStorePitch = Tile::kN + kStorePadding;
  static constexpr size_t kLoads = Tile::kStages * kStage * sizeof(T), kStores = Tile::kM * kStorePitch * sizeof(T);
  static constexpr size_t kPixels = kLoads > kStores ? kLoads : kStores;
  static constexpr size_t kResults = kPixels + Tile::kM * sizeof(Pixel);
  static constexpr size_t kBytes = kResults + Tile::kM * sizeof(int32_t);
  static_assert(kBytes <= kMaxSharedBytes);
};

// Fills, for each pixel of the block, where it reads the operand and where its result is stored (-1: nowhere).
template <typename Tile>
PK_DEVICE void fill_tables(const ConvolveParams& p, const AxisWalk& rows, const AxisWalk& columns, int first,
                           Shared<Pixel> pixels, Shared<int32_t> results) {
  for (int i = threadIdx.x; i < Tile::kM; i += Tile::kThreads) {
    const int column = (first + i) % columns.count, line = (first + i) / columns.count;
    const int row = line % rows.count, image = line / rows.count;
    if (image >= p.images) {
      pixels.set(i, kNoPixel), results.set(i, -1);
      continue;
    }
    const int y = row * p.step[0] + rows.at, x = column * p.step[1] + columns.at;
    pixels.set(i, {(image * p.operand_rows + y) * p.operand_columns + x,
                   kDeadChannel | outside_bits(y, rows.at_step, rows.taps, p.operand_rows) |
                       outside_bits(x, columns.at_step, columns.taps, p.operand_columns) << kMaxTaps});
    results.set(i, (image * p.result_rows + rows.first + row * rows.every) * p.result_columns + columns.first +
                       column * columns.every);
  }
}

// The sums start from the bias.
template <typename T, int kM, int kN>
PK_DEVICE void start_sums(const ConvolveParams& p, int first, Sums<kM, kN>& sums) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = first + sums.column(j) + e;
      float value = 0;
      if (p.bias && n < p.to_live) value = to_float(static_cast<const T*>(p.bias)[p.to_index ? p.to_index[n] : n]);
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) sums.at[i][j][e] = sums.at[i][j][2 + e] = value;
    }
}

PK_DEVICE uint32_t pack_pair(BFloat16 low, BFloat16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
PK_DEVICE uint32_t pack_pair(Half low, Half high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
PK_DEVICE float2 pack_pair(float low, float high) { return make_float2(low, high); }

template <typename T, int kPitch, int kM, int kN>
PK_DEVICE void stage_sums(const Sums<kM, kN>& sums, Shared<T> to) {
#pragma unroll
  for (int i = 0; i < kM / 8; ++i)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float* pair = sums.at[i / 2][j] + i % 2 * 2;
      to.set_vector(sums.row(i / 2, i % 2) * kPitch + sums.column(j),
                    pack_pair(from_float<T>(pair[0]), from_float<T>(pair[1])));
    }
}

PK_DEVICE uint4 pack_vector(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
template <typename T>
PK_DEVICE uint4 pack_vector(const T (&v)[8]) {
  return make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]), pack_pair(v[6], v[7]));
}

// kSpan neighbouring channels of the result, which one thread stores, and where their values come from.
template <typename T, int kSpan>
struct ResultSpan {
  int slot[kSpan];  // of the tile, < 0: fill
  T fill[kSpan];
  uint32_t inside;  // bit e: channel e is the block's
  bool run;         // slots are one aligned run

  PK_DEVICE ResultSpan(const ConvolveParams& p, int channel, int begin, int end, int first) : inside(0) {
    bool consecutive = true;
#pragma unroll
    for (int e = 0; e < kSpan; ++e) {
      const int at = channel + e;
      slot[e] = kDead, fill[e] = T{0};
      if (at < begin || at >= end) continue;
      inside |= 1u << e;
      const int compact = p.to_slot ? p.to_slot[at] : at;
      if (compact == kConstant && p.bias) fill[e] = static_cast<const T*>(p.bias)[at];
      slot[e] = compact < 0 ? kDead : compact - first;
    }
#pragma unroll
    for (int e = 1; e < kSpan; ++e) consecutive = consecutive && slot[e] == slot[0] + e;
    run = consecutive && slot[0] >= 0 && slot[0] % kSpan == 0;
  }

  PK_DEVICE void store(Shared<T> row, T* to) const {  // row of the tile, to: the span's first channel
    if (kSpan > 1 && run) {
      *reinterpret_cast<uint4*>(to) = row.template get_vector<uint4>(slot[0]);
      return;
    }
    T value[kSpan];
#pragma unroll
    for (int e = 0; e < kSpan; ++e) value[e] = slot[e] < 0 ? fill[e] : row.get(slot[e]);
    if constexpr (kSpan > 1) {
      if (inside == (1u << kSpan) - 1) {
        *reinterpret_cast<uint4*>(to) = pack_vector(value);
        return;
      }
    }
#pragma unroll
    for (int e = 0; e < kSpan; ++e)
      if (inside >> e & 1) to[e] = value[e];
  }
};

// Writes the block's full-width channels of all its pixels. A power of two of threads lies along the channels.
template <typename T, typename Tile, int kSpan>
PK_DEVICE void store_result(const ConvolveParams& p, int first, Shared<T> tile, Shared<int32_t> results) {
  const int last = first + Tile::kN;
  const int begin = first == 0 ? 0 : p.to_index ? p.to_index[first] : first;
  const int end = last >= p.to_live ? p.result_channels : p.to_index ? p.to_index[last] : last;
  const int first_span = begin / kSpan, spans = (end - 1) / kSpan + 1 - first_span;
  const int log = min(32 - __clz(spans - 1), 31 - __clz(Tile::kThreads));
  for (int at = threadIdx.x & ((1 << log) - 1); at < spans; at += 1 << log) {
    const int channel = (first_span + at) * kSpan;
    const ResultSpan<T, kSpan> span(p, channel, begin, end, first);
    for (int row = threadIdx.x >> log; row < Tile::kM; row += Tile::kThreads >> log) {
      const int pixel = results.get(row);
      if (pixel < 0) break;
      span.store(tile + row * ConvolveShared<T, Tile>::kStorePitch,
                 static_cast<T*>(p.result) + static_cast<int64_t>(pixel) * p.result_channels + channel);
    }
  }
}

template <typename T, typename Tile>
PK_DEVICE void store_tile(const ConvolveParams& p, int first, Shared<T> tile, Shared<int32_t> results) {
  if (p.wide_stores)
    store_result<T, Tile, kVector<T>>(p, first, tile, results);
  else
    store_result<T, Tile, 1>(p, first, tile, results);
}

template <typename Math, typename Tile, bool kVectors, bool kListed>
PK_DEVICE void convolve(const ConvolveParams& p) {
  using T = Storage<Math>;
  using Layout = ConvolveShared<T, Tile>;
  using Operand = OperandLoader<T, Tile, kVectors>;
  using Multiply = MultiplyRows<Math, Tile::kWarpM, Tile::kWarpN>;
  const AxisWalk rows = p.rows[blockIdx.y / p.classes[1]], columns = p.columns[blockIdx.y % p.classes[1]];
  const int tile = blockIdx.x % p.tiles, first_filter = tile * Tile::kN;
  const int first_pixel = blockIdx.x / p.tiles * Tile::kM;
  if (first_pixel >= p.images * rows.count * columns.count) return;  // a class smaller than the largest

  const Shared<T> stages(0), result_tile(0);
  const Shared<Pixel> pixels(Layout::kPixels);
  const Shared<int32_t> results(Layout::kResults);
  fill_tables<Tile>(p, rows, columns, first_pixel, pixels, results);
  __syncthreads();

  const int warp_row = warp_id() / Tile::kWarpsN * Tile::kWarpM, warp_column = warp_id() % Tile::kWarpsN * Tile::kWarpN;
  Sums<Tile::kWarpM, Tile::kWarpN> sums;
  start_sums<T>(p, first_filter + warp_column, sums);

  Walk<T, kListed, kVectors, Operand::kOwn, Tile::kDeep> walk(p, rows, columns, tile, Operand::vector(),
                                                              Operand::within());
  Operand operand(pixels);
  const WeightLoader<T, Tile> weight(p, first_filter, Operand::weight_line(), Operand::vector());
  const RowLanes<Math> lanes(warp_row, Tile::kM + warp_column);
  const int steps = walk.steps(rows, columns);

  for (int step = 1 - kStages; step < steps; ++step) {  // multiplies from 0 on, loads kStages - 1 ahead
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's chunk has arrived, and all threads have read the previous one
    const int next = step + kStages - 1;
    const bool loads = next < steps;
    const Shared<T> from = stages + (step & (kStages - 1)) * Layout::kStage,
                    to = stages + (next & (kStages - 1)) * Layout::kStage;
    if (loads) {
      weight.start(p, walk, to + Tile::kM * kChunk<T>);
      operand.start(p, walk, to, 0);
    }
    if (step >= 0) Multiply::slice(sums, from, lanes, 0);
    if (Operand::kParts == 2 && loads) {
      operand.finish(to, 0);
      operand.start(p, walk, to, 1);
    }
    if (step >= 0) Multiply::slice(sums, from, lanes, 1);
    if (loads) {
      operand.finish(to, Operand::kParts - 1);
      walk.advance(p, rows, columns, Operand::within());
    }
    cp_async_commit();
  }

  __syncthreads();
  stage_sums<T, Layout::kStorePitch>(sums, result_tile + warp_row * Layout::kStorePitch + warp_column);
  __syncthreads();
  store_tile<T, Tile>(p, first_filter, result_tile, results);
}

}  // namespace prunekernels
