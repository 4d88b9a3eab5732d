// The depthwise kernels for one vector type S of simd.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_sums.h"

namespace prunekernels {

template <class S>
struct DepthwiseSet {
  using Vector = typename S::Vector;
  static constexpr int L = S::kLanes;
  static constexpr bool kMany = S::kRegisters == 32;

  // Registers: the tile's outputs, a part's weights and a vector of x.
  static constexpr int most_rows(int vectors, bool kChannels) {
    const int rows = (kMany ? 16 : 8) / vectors, most = kChannels ? 4 : kMostTileRows;
    return rows < most ? rows : most;
  }

  // What masked loads read is not fetched ahead, so they are for places where a whole load may not be.
  PK_INLINE Vector first_of(const float* p, int count, bool is_whole) {
    return is_whole ? S::keep_first(S::load(p), count) : S::load_first(p, count);
  }

  template <bool kChannels>
  PK_INLINE int64_t distance(int v, int64_t vector) {
    return kChannels ? v * vector : static_cast<int64_t>(v) * L;
  }

  template <bool kChannels>
  PK_INLINE Vector number(const float* p) {
    if constexpr (kChannels)
      return S::load(p);
    else
      return S::set(*p);
  }

  template <bool kChannels, int R, int V, int K>
  PK_INLINE void add_part(Vector (&sums)[R][V], const float* x, const DepthwiseTile& t, const float* w, int64_t step) {
    Vector weights[K];
    PK_UNROLL for (int k = 0; k < K; ++k) {
      weights[k] = number<kChannels>(w + k * step);
      S::keep(weights[k]);
    }
    PK_UNROLL for (int i = 0; i < R + K - 1; ++i) {
      PK_UNROLL for (int v = 0; v < V; ++v) {
        Vector at = S::load(x + i * t.x_row + distance<kChannels>(v, t.x_vector));
        S::keep(at);
        PK_UNROLL for (int k = 0; k < K; ++k) {
          const int r = i - k;
          if (r >= 0 && r < R) sums[r][v] = S::fma(weights[k], at, sums[r][v]);
        }
      }
    }
  }

  template <bool kChannels, int R, int V>
  static void conv(const DepthwiseTile& t) {
    Vector sums[R][V];
    const Vector start = number<kChannels>(t.start);
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = start;
    constexpr int64_t kUnit = kChannels ? L : 1;
    for (const DepthwisePart *part = t.parts, *end = part + t.part_count; part < end; ++part) {
      const float *x = t.x + part->offset, *w = t.weights + part->tap * kUnit;
      const int64_t step = part->tap_step * kUnit;
      switch (part->rows) {
        case 1:
          add_part<kChannels, R, V, 1>(sums, x, t, w, step);
          break;
        case 2:
          add_part<kChannels, R, V, 2>(sums, x, t, w, step);
          break;
        case 3:
          add_part<kChannels, R, V, 3>(sums, x, t, w, step);
          break;
        case 4:
          add_part<kChannels, R, V, 4>(sums, x, t, w, step);
          break;
        default:
          add_part<kChannels, R, V, 5>(sums, x, t, w, step);
      }
    }
    const auto live = S::lanes(kChannels ? t.live : ~0u);
    PK_UNROLL for (int r = 0; r < R; ++r) {
      PK_UNROLL for (int v = 0; v < V; ++v) {
        if constexpr (kChannels) sums[r][v] = S::keep_lanes(sums[r][v], live);
        float* y = t.y + r * t.y_row + distance<kChannels>(v, t.y_vector);
        if ((!kChannels && v < V - 1) || t.last == L || r < t.whole_rows)
          S::store(y, sums[r][v]);
        else
          S::store_first(y, sums[r][v], t.last);
      }
    }
  }

  // Each tap has several sums, since a multiply-add has to wait for the one before it.
  template <bool kChannels, int R, int V, int K>
  PK_INLINE void dot_part(const Vector (&g)[R][V], const float* x, const DepthwiseDots& d, float* sums, int64_t step) {
    constexpr int kFit = (kMany ? 12 : 6) / K, kChains = kFit < 1 ? 1 : kFit < 4 ? kFit : 4;
    Vector chains[K][kChains];
    PK_UNROLL for (int k = 0; k < K; ++k) {
      chains[k][0] = S::load(sums + k * step);
      PK_UNROLL for (int j = 1; j < kChains; ++j) chains[k][j] = S::zero();
    }
    PK_UNROLL for (int i = 0; i < R + K - 1; ++i) {
      PK_UNROLL for (int v = 0; v < V; ++v) {
        const float* from = x + i * d.x_row + distance<kChannels>(v, d.x_vector);
        Vector at = !kChannels && v == V - 1 ? S::load_first(from, d.last) : S::load(from);
        S::keep(at);
        PK_UNROLL for (int k = 0; k < K; ++k) {
          const int r = i - k;
          if (r >= 0 && r < R) {
            Vector& sum = chains[k][(r * V + v) % kChains];
            sum = S::fma(g[r][v], at, sum);
          }
        }
      }
    }
    const Vector one = S::set(1);
    PK_UNROLL for (int k = 0; k < K; ++k) {
      PK_UNROLL for (int j = 1; j < kChains; ++j) chains[k][0] = S::fma(one, chains[k][j], chains[k][0]);
      S::store(sums + k * step, chains[k][0]);
    }
  }

  template <bool kChannels, int R, int V>
  static void dots(const DepthwiseDots& d) {
    Vector g[R][V];
    PK_UNROLL for (int r = 0; r < R; ++r) PK_UNROLL for (int v = 0; v < V; ++v) {
      const float* from = d.g + r * d.g_row + distance<kChannels>(v, d.g_vector);
      g[r][v] = !kChannels && v == V - 1 ? first_of(from, d.last, r < d.whole_rows) : S::load(from);
      S::keep(g[r][v]);
    }
    for (const DepthwisePart *part = d.parts, *end = part + d.part_count; part < end; ++part) {
      const float* x = d.x + part->offset;
      float* sums = d.sums + part->tap * L;
      const int64_t step = part->tap_step * L;
      switch (part->rows) {
        case 1:
          dot_part<kChannels, R, V, 1>(g, x, d, sums, step);
          break;
        case 2:
          dot_part<kChannels, R, V, 2>(g, x, d, sums, step);
          break;
        case 3:
          dot_part<kChannels, R, V, 3>(g, x, d, sums, step);
          break;
        case 4:
          dot_part<kChannels, R, V, 4>(g, x, d, sums, step);
          break;
        default:
          dot_part<kChannels, R, V, 5>(g, x, d, sums, step);
      }
    }
  }

  static void add_lanes(const float* sums, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
      Vector v[16];
      float added[16] = {};
      PK_UNROLL for (int j = 0; j < 16; ++j) v[j] = S::load(sums + (i + j) * L);
      HorizontalSums<S>::add(v, added, std::integral_constant<int, 16>());
      for (int64_t j = 0; j < 16 && i + j < count; ++j) out[i + j] += added[j];
    }
  }

  static void copy_rows(const float* from, int64_t from_row, int64_t rows, int64_t count, const float* end, float* to,
                        int64_t to_row) {
    const int rest = static_cast<int>(count % L);
    const int64_t whole = count - rest;
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
      for (int64_t i = 0; i < whole; i += L) S::store(to + i, S::load(from + i));
      if (rest) S::store(to + whole, first_of(from + whole, rest, end - from >= whole + L));
    }
  }

  static void split_rows(const float* from, int64_t from_row, int64_t rows, int64_t count, const float* end,
                         float* even, float* odd, int64_t to_row) {
    const int rest = static_cast<int>(count % (2 * L));
    const int64_t whole = count - rest;
    for (int64_t r = 0; r < rows; ++r, from += from_row, even += to_row, odd += to_row) {
      Vector a, b;
      for (int64_t i = 0; i < whole; i += 2 * L) {
        S::split(from + i, a, b);
        S::store(even + i / 2, a);
        S::store(odd + i / 2, b);
      }
      if (!rest) continue;
      const float* last = from + whole;
      if (end - last >= 2 * L) {
        S::split(last, a, b);
      } else {
        float line[2 * L];
        S::store(line, rest < L ? S::load_first(last, rest) : S::load(last));
        S::store(line + L, rest > L ? S::load_first(last + L, rest - L) : S::zero());
        S::split(line, a, b);
      }
      S::store(even + whole / 2, S::keep_first(a, (rest + 1) / 2));
      S::store(odd + whole / 2, rest > 1 ? S::keep_first(b, rest / 2) : S::zero());
    }
  }

  static void merge_rows(const float* even, const float* odd, int64_t from_row, int64_t rows, int64_t count, float* to,
                         int64_t to_row) {
    const int rest = static_cast<int>(count % (2 * L));
    const int64_t whole = count - rest;
    for (int64_t r = 0; r < rows; ++r, even += from_row, odd += from_row, to += to_row) {
      for (int64_t i = 0; i < whole; i += 2 * L) S::merge(to + i, S::load(even + i / 2), S::load(odd + i / 2));
      if (!rest) continue;
      float line[2 * L];
      S::merge(line, S::load(even + whole / 2), S::load(odd + whole / 2));
      if (rest < L) {
        S::store_first(to + whole, S::load(line), rest);
      } else {
        S::store(to + whole, S::load(line));
        if (rest > L) S::store_first(to + whole + L, S::load(line + L), rest - L);
      }
    }
  }

  template <bool kChannels, int R, int V>
  static void fill(DepthwiseTiles& tiles) {
    tiles.most_rows[V] = most_rows(V, kChannels);
    tiles.conv[R][V] = conv<kChannels, R, V>;
    tiles.dots[R][V] = dots<kChannels, R, V>;
    if constexpr (R < most_rows(V, kChannels))
      fill<kChannels, R + 1, V>(tiles);
    else if constexpr (V < kMostTileVectors)
      fill<kChannels, 1, V + 1>(tiles);
  }

  static DepthwiseKernels table() {
    DepthwiseKernels k{};
    k.lanes = L;
    fill<false, 1, 1>(k.columns);
    fill<true, 1, 1>(k.channels);
    k.add_lanes = add_lanes;
    k.copy_rows = copy_rows, k.split_rows = split_rows, k.merge_rows = merge_rows;
    return k;
  }
};

}  // namespace prunekernels
