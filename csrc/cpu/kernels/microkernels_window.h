// 3x3 convolutions at stride 1 and 2 of one filter (the sparse plan); a vector (a cell) holds the same pixel of several
// images. One filter alone would need a load for each multiply-add. Here each cell of the tile's input is loaded once
// and added into every output within its reach, while the nine weights (in the weight gradient: nine sums) stay in
// registers.
// At stride 2 the cells lie apart in four phases (plane_layout.h), of even and odd rows and columns.
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

  // What a sum begins with.
  PK_INLINE Vector first(const ConvTile& a, const float* y) {
    return a.adds ? S::load(y) : a.start ? S::set(a.start[0]) : S::zero();
  }

  // Row `row` of a window's input at stride kStep: where its even and its odd columns begin.
  template <int kStep, typename Tile>
  PK_INLINE void find_row(const Tile& a, const float* x, int row, const float* (&columns)[kStep]) {
    columns[0] = x + (kStep > 1 ? row % kStep * kStep * a.x_phase : 0) + row / kStep * a.x_row;
    if constexpr (kStep == 2) columns[1] = columns[0] + a.x_phase;
  }

  // y[r][v] = start + sum over channels and taps of weights[channel, tap] * x[r + tap / 3][v + tap % 3]
  template <int R, int V, int kStep, bool kWhole>
  static void conv(const ConvTile& a) {
    Vector sums[R][V];
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] =
        first(a, a.y[0] + r * a.y_row + v * L);
    const float* w = a.weights;
    for (int64_t c = 0; c < a.channel_count; ++c, w += kTaps) {
      const float* channel = a.x + a.channels[c];
      Vector weights[kTaps];
      PK_UNROLL for (int t = 0; t < kTaps; ++t) {
        weights[t] = S::set(w[t]);
        S::keep(weights[t]);
      }
      PK_UNROLL for (int r = 0; r < kStep * (R - 1) + 3; ++r) {
        const float* columns[kStep];
        find_row<kStep>(a, channel, r, columns);
        PK_UNROLL for (int v = 0; v < kStep * (V - 1) + 3; ++v) {
          if (padding<R, V, kWhole>(r, v)) continue;
          Vector x = S::load(columns[v % kStep] + v / kStep * L);
          S::keep(x);
          PK_UNROLL for (int t = 0; t < kTaps; ++t) {
            const int p = r - t / 3, q = v - t % 3;
            if (p >= 0 && p < kStep * R && q >= 0 && q < kStep * V && p % kStep == 0 && q % kStep == 0)
              sums[p / kStep][q / kStep] = S::fma(weights[t], x, sums[p / kStep][q / kStep]);
          }
        }
      }
    }
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v)
        S::store(a.y[0] + r * a.y_row + v * L, sums[r][v]);
  }

  // y[2 r + t / 3 - 1][2 v + t % 3 - 1] = sum over channels and taps t of weights[channel, t] * x[r][v]: 2 R times 2 V
  // results, of which those of even and odd rows and columns lie apart.
  template <int R, int V>
  static void conv_turned(const ConvTile& a) {
    const auto result = [&](int p, int q) {
      return a.y[0] + (p % 2 * 2 + q % 2) * a.y_class + p / 2 * a.y_row + q / 2 * L;
    };
    Vector sums[2 * R][2 * V];
    PK_UNROLL for (int p = 0; p < 2 * R; ++p) PK_UNROLL for (int q = 0; q < 2 * V; ++q) sums[p][q] =
        first(a, result(p, q));
    const float* w = a.weights;
    for (int64_t c = 0; c < a.channel_count; ++c, w += kTaps) {
      const float* channel = a.x + a.channels[c];
      Vector weights[kTaps];
      PK_UNROLL for (int t = 0; t < kTaps; ++t) {
        weights[t] = S::set(w[t]);
        S::keep(weights[t]);
      }
      PK_UNROLL for (int r = 0; r < R + 1; ++r) PK_UNROLL for (int v = 0; v < V + 1; ++v) {
        Vector x = S::load(channel + r * a.x_row + v * L);
        S::keep(x);
        PK_UNROLL for (int t = 0; t < kTaps; ++t) {
          const int p = 2 * r + t / 3 - 1, q = 2 * v + t % 3 - 1;
          if (p >= 0 && p < 2 * R && q >= 0 && q < 2 * V) sums[p][q] = S::fma(weights[t], x, sums[p][q]);
        }
      }
    }
    PK_UNROLL for (int p = 0; p < 2 * R; ++p) PK_UNROLL for (int q = 0; q < 2 * V; ++q)
        S::store(result(p, q), sums[p][q]);
  }

  // out[t] += sum over planes and over tiles, `down` times `across` of them, of g[r][v] * x[r + t / 3][v + t % 3]
  template <int R, int V, int kStep, bool kWhole>
  static void dot(const DotTile& a, const float* g, const float* x, int64_t down, int64_t across, float* out) {
    Vector sum[kTaps];
    PK_UNROLL for (int t = 0; t < kTaps; ++t) sum[t] = a.begins ? S::zero() : S::load(a.carry + t * L);
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
          PK_UNROLL for (int r = 0; r < kStep * (R - 1) + 3; ++r) {
            const float* columns[kStep];
            find_row<kStep>(a, x_tile, r, columns);
            PK_UNROLL for (int v = 0; v < kStep * (V - 1) + 3; ++v) {
              if (padding<R, V, kWhole>(r, v)) continue;
              Vector cell = S::load(columns[v % kStep] + v / kStep * L);
              S::keep(cell);
              PK_UNROLL for (int t = 0; t < kTaps; ++t) {
                const int p = r - t / 3, q = v - t % 3;
                if (p >= 0 && p < kStep * R && q >= 0 && q < kStep * V && p % kStep == 0 && q % kStep == 0)
                  sum[t] = S::fma(gs[p / kStep][q / kStep], cell, sum[t]);
              }
            }
          }
        }
      }
    if (a.ends)
      HorizontalSums<S>::add(sum, out, std::integral_constant<int, kTaps>());
    else
      PK_UNROLL for (int t = 0; t < kTaps; ++t) S::store(a.carry + t * L, sum[t]);
  }

  template <int R, int V>
  static void fill(Microkernels& k) {
    if constexpr (fits(R, V)) {
      k.window[R][V] = conv<R, V, 1, false>;
      k.dot_window[R][V] = dot<R, V, 1, false>;
      if constexpr (V < kMaxWindowVectors) {  // or else there are more cells than PK_UNROLL unrolls
        k.window2[R][V] = conv<R, V, 2, false>;
        k.dot_window2[R][V] = dot<R, V, 2, false>;
      }
      if constexpr (4 * R * V <= kMostCells) k.window_turned[R][V] = conv_turned<R, V>;
      if constexpr (V <= kMaxRows) {
        k.window_whole[R][V] = conv<R, V, 1, true>;
        k.dot_window_whole[R][V] = dot<R, V, 1, true>;
      }
    }
    if constexpr (V < kMaxWindowVectors)
      fill<R, V + 1>(k);
    else if constexpr (R < kMaxRows)
      fill<R + 1, 1>(k);
  }
};

}  // namespace prunekernels
