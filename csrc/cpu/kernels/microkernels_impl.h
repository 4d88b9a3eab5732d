// The microkernels for one vector type S of simd.h. The largest tiles fill the register file: filters x vectors sums,
// the vectors of x, and one broadcast weight.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/microkernels_window.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_sums.h"

namespace prunekernels {

template <class S>
struct MicrokernelSet {
  using Vector = typename S::Vector;
  static constexpr int L = S::kLanes;

  static constexpr int most_vectors(int filters) {
    if (filters == 1) return S::kRegisters == 32 ? 16 : 8;
    int vectors = 0;
    while (filters * (vectors + 1) + (vectors + 1) + 1 <= S::kRegisters && vectors < kMaxVectors) ++vectors;
    return vectors;
  }

  template <int I, int V, bool kPart>
  static void conv(const ConvTile& a) {
    Vector sums[I][V];
    PK_UNROLL for (int i = 0; i < I; ++i) {
      const Vector start = a.start ? S::set(a.start[i]) : S::zero();
      PK_UNROLL for (int v = 0; v < V; ++v) sums[i][v] = start;
    }
    const float *x = a.x, *w = a.weights;
    const int last = a.last;
    for (int64_t c = 0; c < a.channel_count; ++c) {
      const float* channel = x + a.channels[c];
      for (int64_t t = 0; t < a.tap_count; ++t, w += I) {
        const float* at = channel + a.taps[t];
        const auto operand = [&](int v) {
          return kPart && v == V - 1 ? S::load_first(at + v * L, last) : S::load(at + v * L);
        };
        if constexpr (I == 1) {
          const Vector weight = S::set(*w);
          PK_UNROLL for (int v = 0; v < V; ++v) sums[0][v] = S::fma(weight, operand(v), sums[0][v]);
        } else {
          Vector xs[V];
          PK_UNROLL for (int v = 0; v < V; ++v) {
            xs[v] = operand(v);
            S::keep(xs[v]);
          }
          PK_UNROLL for (int i = 0; i < I; ++i) {
            const Vector weight = S::set(w[i]);
            PK_UNROLL for (int v = 0; v < V; ++v) sums[i][v] = S::fma(weight, xs[v], sums[i][v]);
          }
        }
      }
    }
    PK_UNROLL for (int i = 0; i < I; ++i) {
      float* y = a.y[i];
      PK_UNROLL for (int v = 0; v < V; ++v) {
        if (kPart && v == V - 1)
          S::store_first(y + v * L, sums[i][v], last);
        else
          S::store(y + v * L, sums[i][v]);
      }
    }
  }

  template <int R, int V>
  static void conv_rows(const ConvTile& a) {
    Vector sums[R][V];
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] =
        WindowMicrokernels<S>::first(a, a.y[0] + r * a.y_row + v * L);
    const float *x = a.x, *w = a.weights;
    for (int64_t c = 0; c < a.channel_count; ++c) {
      const float* channel = x + a.channels[c];
      for (int64_t t = 0; t < a.tap_count; ++t) {
        const float* at = channel + a.taps[t];
        const Vector weight = S::set(*w++);
        PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] =
            S::fma(weight, S::load(at + r * a.x_row + v * L), sums[r][v]);
      }
    }
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v)
        S::store(a.y[0] + r * a.y_row + v * L, sums[r][v]);
  }

  // Every x stands for kShifts operands that lie kShift floats apart.
  template <int F, int J, int kShifts, int kShift>
  static void dot(const DotTile& a) {
    Vector sums[F][J][kShifts];
    PK_UNROLL for (int f = 0; f < F; ++f) PK_UNROLL for (int j = 0; j < J; ++j)
        PK_UNROLL for (int s = 0; s < kShifts; ++s) sums[f][j][s] = S::zero();
    const int64_t whole = (a.vectors - (a.last < L)) * L;
    for (int64_t n = 0; n < a.planes; ++n) {
      const float *g[F], *x[J];
      PK_UNROLL for (int f = 0; f < F; ++f) g[f] = a.g[f] + n * a.g_plane;
      PK_UNROLL for (int j = 0; j < J; ++j) x[j] = a.x[j] + n * a.x_plane;
      for (int64_t r = 0; r < a.rows; ++r) {
        for (int64_t e = 0; e < whole; e += L) {
          Vector gs[F];
          PK_UNROLL for (int f = 0; f < F; ++f) gs[f] = S::load(g[f] + e);
          PK_UNROLL for (int j = 0; j < J; ++j) {
            PK_UNROLL for (int s = 0; s < kShifts; ++s) {
              Vector xs = S::load(x[j] + e + s * kShift);
              if constexpr (F > 1) S::keep(xs);
              PK_UNROLL for (int f = 0; f < F; ++f) sums[f][j][s] = S::fma(gs[f], xs, sums[f][j][s]);
            }
          }
        }
        if (a.last < L) PK_UNROLL for (int f = 0; f < F; ++f) {
            const Vector gs = S::load_first(g[f] + whole, a.last);
            PK_UNROLL for (int j = 0; j < J; ++j) PK_UNROLL for (int s = 0; s < kShifts; ++s) sums[f][j][s] =
                S::fma(gs, S::load_first(x[j] + whole + s * kShift, a.last), sums[f][j][s]);
          }
        PK_UNROLL for (int f = 0; f < F; ++f) g[f] += a.g_row;
        PK_UNROLL for (int j = 0; j < J; ++j) x[j] += a.x_row;
      }
    }
    HorizontalSums<S>::add(&sums[0][0][0], a.out, std::integral_constant<int, F * J * kShifts>());
  }

  static void pack_list(const float* from, int64_t stride, int64_t kernel, const int32_t* at, int64_t count,
                        const int32_t* order, int64_t taps, float* to) {
    constexpr int64_t kAhead = 8;  // the hardware cannot guess where the next live kernel lies
    const auto ahead = [&](int64_t j) {
      if (j + kAhead < count) __builtin_prefetch(from + at[j + kAhead] * stride);
    };
    if constexpr (L == 16) {
      if (kernel <= L) {
        const auto places = S::places(order, static_cast<int>(taps));
        for (int64_t j = 0; j < count; ++j, to += taps) {
          ahead(j);
          S::store_first(to, S::permute(S::load_first(from + at[j] * stride, static_cast<int>(kernel)), places),
                         static_cast<int>(taps));
        }
        return;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      ahead(j);
      for (int64_t t = 0; t < taps; ++t) *to++ = from[at[j] * stride + order[t]];
    }
  }

  static void copy(const float* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + L <= count; i += L) S::store(to + i, S::load(from + i));
    if (i < count)
      S::store_first(to + i, S::load_first(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  }

  static void zero(float* to, int64_t count) {
    int64_t i = 0;
    for (; i + L <= count; i += L) S::store(to + i, S::zero());
    if (i < count) S::store_first(to + i, S::zero(), static_cast<int>(count - i));
  }

  static constexpr int kAhead = 4 * L;

  static void images_to_lanes(const float* from, const LaneRuns& runs, const int32_t* cells, float* to, int64_t ahead) {
    for (int32_t p = runs.any_begin; p < runs.any_end; p += L) {
      const int count = runs.any_end - p < L ? runs.any_end - p : L;
      const int64_t later = p + kAhead < runs.any_end ? p + kAhead : ahead + runs.any_begin + p + kAhead - runs.any_end;
      PK_UNROLL for (int n = 0; n < L; ++n) __builtin_prefetch(from + later + runs.at[n], 0, 2);
      Vector v[L];
      if (p >= runs.all_begin && p + L <= runs.all_end)
        PK_UNROLL for (int n = 0; n < L; ++n) v[n] = S::load(from + runs.at[n] + p);
      else
        PK_UNROLL for (int n = 0; n < L; ++n) v[n] =
            S::load_between(from + runs.at[n] + p, runs.begin[n] - p, runs.end[n] - p);
      S::transpose(v);
      if (count == L)
        PK_UNROLL for (int i = 0; i < L; ++i) S::store(to + static_cast<int64_t>(cells[p + i]) * L, v[i]);
      else
        PK_UNROLL for (int i = 0; i < L; ++i) if (i < count)
            S::store(to + static_cast<int64_t>(cells[p + i]) * L, v[i]);
    }
  }

  static void lanes_to_images(const float* from, const int32_t* cells, float* to, const LaneRuns& runs, int64_t ahead) {
    for (int32_t p = runs.any_begin; p < runs.any_end; p += L) {
      const int count = runs.any_end - p < L ? runs.any_end - p : L;
      const int64_t later = p + kAhead < runs.any_end ? p + kAhead : ahead + runs.any_begin + p + kAhead - runs.any_end;
      PK_UNROLL for (int n = 0; n < L; ++n) __builtin_prefetch(to + later + runs.at[n], 1, 2);
      Vector v[L];
      if (count == L)
        PK_UNROLL for (int i = 0; i < L; ++i) v[i] = S::load(from + static_cast<int64_t>(cells[p + i]) * L);
      else
        PK_UNROLL for (int i = 0; i < L; ++i) v[i] =
            i < count ? S::load(from + static_cast<int64_t>(cells[p + i]) * L) : S::zero();
      S::transpose(v);
      if (p >= runs.all_begin && p + L <= runs.all_end)
        PK_UNROLL for (int n = 0; n < L; ++n) S::store(to + runs.at[n] + p, v[n]);
      else
        PK_UNROLL for (int n = 0; n < L; ++n)
            S::store_between(to + runs.at[n] + p, v[n], runs.begin[n] - p, runs.end[n] - p);
    }
  }

  static void split(const float* from, float* even, float* odd, int64_t count) {
    int64_t i = 0;
    for (; 2 * (i + L) <= count; i += L) {
      Vector a, b;
      S::split(from + 2 * i, a, b);
      S::store(even + i, a);
      S::store(odd + i, b);
    }
    for (; 2 * i < count; ++i) {
      even[i] = from[2 * i];
      if (2 * i + 1 < count) odd[i] = from[2 * i + 1];
    }
  }

  static void merge(const float* even, const float* odd, float* to, int64_t count) {
    int64_t i = 0;
    for (; 2 * (i + L) <= count; i += L) S::merge(to + 2 * i, S::load(even + i), S::load(odd + i));
    for (; 2 * i < count; ++i) {
      to[2 * i] = even[i];
      if (2 * i + 1 < count) to[2 * i + 1] = odd[i];
    }
  }

  template <int I, int V>
  static void fill_conv(Microkernels& k) {
    k.conv[I][V] = conv<I, V, false>;
    k.conv_part[I][V] = conv<I, V, true>;
    if constexpr (V < most_vectors(I))
      fill_conv<I, V + 1>(k);
    else if constexpr (I < kMaxFilters && most_vectors(I + 1) > 0)
      fill_conv<I + 1, 1>(k);
  }

  static constexpr bool kMany = S::kRegisters == 32;
  static constexpr int kRowsVectors = kMany ? 28 : 12, kRowVectors = kMany ? 8 : 4;

  template <int R, int V>
  static void fill_rows(Microkernels& k) {
    if constexpr (R * V <= kRowsVectors) k.conv_rows[R][V] = conv_rows<R, V>;
    if constexpr (V < kRowVectors)
      fill_rows<R, V + 1>(k);
    else if constexpr (R < kMaxRows)
      fill_rows<R + 1, 1>(k);
  }

  template <int F, int J>
  static void fill_dot(Microkernels& k) {
    k.dot[F][J] = dot<F, J, 1, 1>;
    if constexpr (J < (kMany ? 6 : 3))
      fill_dot<F, J + 1>(k);
    else if constexpr (F < (kMany ? 4 : 3))
      fill_dot<F + 1, 1>(k);
  }

  template <int F, int J>
  static void fill_dot3(Microkernels& k) {
    k.dot3[F][J] = dot<F, J, 3, 1>;
    k.dot3_images[F][J] = dot<F, J, 3, L>;
    if constexpr (J < 3)
      fill_dot3<F, J + 1>(k);
    else if constexpr (F < (kMany ? 3 : 1))
      fill_dot3<F + 1, 1>(k);
  }

  static Microkernels table() {
    Microkernels k{};
    k.lanes = L;
    for (int i = 1; i <= kMaxFilters; ++i) {
      k.conv_vectors[i] = most_vectors(i);
      if (most_vectors(i) > 1) k.most_filters = i;
    }
    k.dot_filters = kMany ? 4 : 3;
    k.dot_xs = kMany ? 6 : 3;
    k.dot3_filters = kMany ? 3 : 1;
    k.dot3_images_filters = kMany ? 2 : 1;
    fill_conv<1, 1>(k);
    k.rows_vectors = kRowsVectors;
    k.most_row_vectors = kRowVectors;
    fill_rows<1, 1>(k);
    WindowMicrokernels<S>::template fill<1, 1>(k);
    fill_dot<1, 1>(k);
    fill_dot3<1, 1>(k);
    k.pack_list = pack_list;
    k.copy = copy;
    k.zero = zero;
    k.split = split;
    k.merge = merge;
    k.images_to_lanes = images_to_lanes;
    k.lanes_to_images = lanes_to_images;
    return k;
  }
};

}  // namespace prunekernels
