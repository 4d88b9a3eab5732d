// 3x3 convolutions at stride 1 of one filter (the sparse plan); a vector (a cell) holds the same pixel of several
// images. One filter alone would need a load for each multiply-add. Here each cell of the tile's input is loaded once
// and added into every output within its reach, while the nine weights (in the weight gradient: nine sums) stay in
// registers.
// kWhole: the tile is the whole plane, with one cell of padding around it that is neither read nor multiplied.
#pragma once

#include <type_traits>

#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_sums.h"

namespace prunekernels {

template <class S>
struct WindowMicrokernels {
  using Vector = typename S::Vector;
  static constexpr int L = S::kLanes;
  static constexpr int kTaps = 9;
  // Registers for outputs: all but the nine weights (or sums), the cell and a spare one.
  static constexpr int kMostCells = S::kRegisters - kTaps - 2;

  static constexpr bool fits(int rows, int vectors) { return L > 1 && rows * vectors <= kMostCells; }

  template <int R, int V, bool kWhole>
  static constexpr bool padding(int row, int column) {
    return kWhole && (row == 0 || row == R + 1 || column == 0 || column == V + 1);
  }

  // y[r][v] = start + sum over channels and taps of weights[channel, tap] * x[r + tap / 3][v + tap % 3]
  template <int R, int V, bool kWhole>
  static void conv(const ConvTile& a) {
    Vector sums[R][V];
    const Vector start = a.start ? S::set(a.start[0]) : S::zero();
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = start;
    const float* w = a.weights;
    for (int64_t c = 0; c < a.channel_count; ++c, w += kTaps) {
      const float* channel = a.x + a.channels[c];
      Vector weights[kTaps];
      PK_UNROLL for (int t = 0; t < kTaps; ++t) {
        weights[t] = S::set(w[t]);
        S::keep(weights[t]);
      }
      PK_UNROLL for (int r = 0; r < R + 2; ++r) PK_UNROLL for (int v = 0; v < V + 2; ++v) {
        if (padding<R, V, kWhole>(r, v)) continue;
        Vector x = S::load(channel + r * a.x_row + v * L);
        S::keep(x);
        PK_UNROLL for (int t = 0; t < kTaps; ++t) {
          const int p = r - t / 3, q = v - t % 3;
          if (p >= 0 && p < R && q >= 0 && q < V) sums[p][q] = S::fma(weights[t], x, sums[p][q]);
        }
      }
    }
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v)
        S::store(a.y[0] + r * a.y_row + v * L, sums[r][v]);
  }

  // out[t] += sum over planes and over tiles, `down` times `across` of them, of g[r][v] * x[r + t / 3][v + t % 3]
  template <int R, int V, bool kWhole>
  static void dot(const DotTile& a, const float* g, const float* x, int64_t down, int64_t across, float* out) {
    Vector sum[kTaps];
    PK_UNROLL for (int t = 0; t < kTaps; ++t) sum[t] = S::zero();
    for (int64_t n = 0; n < a.planes; ++n)
      for (int64_t i = 0; i < down; ++i) {
        const float* g_tile = g + n * a.g_plane + i * R * a.g_row;
        const float* x_tile = x + n * a.x_plane + i * R * a.x_row;
        for (int64_t j = 0; j < across; ++j, g_tile += V * L, x_tile += V * L) {
          Vector gs[R][V];
          PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) {
            gs[r][v] = S::load(g_tile + r * a.g_row + v * L);
            S::keep(gs[r][v]);
          }
          PK_UNROLL for (int r = 0; r < R + 2; ++r) PK_UNROLL for (int v = 0; v < V + 2; ++v) {
            if (padding<R, V, kWhole>(r, v)) continue;
            Vector cell = S::load(x_tile + r * a.x_row + v * L);
            S::keep(cell);
            PK_UNROLL for (int t = 0; t < kTaps; ++t) {
              const int p = r - t / 3, q = v - t % 3;
              if (p >= 0 && p < R && q >= 0 && q < V) sum[t] = S::fma(gs[p][q], cell, sum[t]);
            }
          }
        }
      }
    HorizontalSums<S>::add(sum, out, std::integral_constant<int, kTaps>());
  }

  template <int R, int V>
  static void fill(Microkernels& k) {
    if constexpr (fits(R, V)) {
      k.window[R][V] = conv<R, V, false>;
      k.dot_window[R][V] = dot<R, V, false>;
      if constexpr (V <= kMaxRows) {
        k.window_whole[R][V] = conv<R, V, true>;
        k.dot_window_whole[R][V] = dot<R, V, true>;
      }
    }
    if constexpr (V < kMaxWindowVectors)
      fill<R, V + 1>(k);
    else if constexpr (R < kMaxRows)
      fill<R + 1, 1>(k);
  }
};

}  // namespace prunekernels
