// The avx512bf16 row of quads in kernel_table.inc.
#include "cpu/kernels/quad_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

#define PK_AVX512
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_sums.h"

namespace prunekernels {
namespace {

using S = Avx512Float;

__m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= kQuadLanes ? 0xffff : (1u << count) - 1); }

// Lane p: low p, high p.
__m512i rounded_pairs(__m512 low, __m512 high) {
  const __m512i halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(halves, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

template <int kVectors>
void conv(const QuadTile& t) {
  __m512 sum[kQuad][kVectors];
  PK_UNROLL for (int i = 0; i < kQuad; ++i) PK_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] =
      _mm512_set1_ps(t.start[i]);
  const uint32_t* w = t.weights;
  for (int64_t j = 0; j < t.pair_count; ++j) {
    const uint32_t* plane = t.x + t.pairs[j];
    for (int64_t tap = 0; tap < t.tap_count; ++tap, w += kQuad) {
      const uint32_t* x = plane + t.taps[tap];
      __m512i weight[kQuad];
      PK_UNROLL for (int i = 0; i < kQuad; ++i) weight[i] = _mm512_set1_epi32(static_cast<int32_t>(w[i]));
      PK_UNROLL for (int v = 0; v < kVectors; ++v) {
        const __m512i pair = _mm512_loadu_si512(x + v * kQuadLanes);
        PK_UNROLL for (int i = 0; i < kQuad; ++i) sum[i][v] = dot(sum[i][v], weight[i], pair);
      }
    }
  }
  PK_UNROLL for (int half = 0; half < kQuad / 2; ++half) PK_UNROLL for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_si512(t.y + half * t.y_plane + v * kQuadLanes,
                          rounded_pairs(sum[2 * half][v], sum[2 * half + 1][v]));
}

template <int kXs>
void dots(const QuadDots& d) {
  __m512 sum[kQuad][kXs];
  PK_UNROLL for (int f = 0; f < kQuad; ++f) PK_UNROLL for (int j = 0; j < kXs; ++j) sum[f][j] = _mm512_setzero_ps();
  for (int64_t at = 0; at < d.vectors * 2 * kQuadLanes; at += 2 * kQuadLanes) {
    __m512i g[kQuad];
    PK_UNROLL for (int f = 0; f < kQuad; ++f) g[f] = _mm512_loadu_si512(d.g[f] + at);
    PK_UNROLL for (int j = 0; j < kXs; ++j) {
      const __m512i x = _mm512_loadu_si512(d.x[j] + at);
      PK_UNROLL for (int f = 0; f < kQuad; ++f) sum[f][j] = dot(sum[f][j], g[f], x);
    }
  }
  HorizontalSums<S>::add(&sum[0][0], d.out, std::integral_constant<int, kQuad * kXs>());
}

// Words 16 at a time: v[i] = those of pixel i, then those of one word after the other.
PK_INLINE void transpose(__m512i (&v)[kQuadLanes]) {
  __m512 floats[kQuadLanes];
  PK_UNROLL for (int i = 0; i < kQuadLanes; ++i) floats[i] = _mm512_castsi512_ps(v[i]);
  S::transpose(floats);
  PK_UNROLL for (int i = 0; i < kQuadLanes; ++i) v[i] = _mm512_castps_si512(floats[i]);
}

// Channels `from` to `from` + 31 of pixels i to i + 15 of a padded row, `some` of them: v[j] = pair j of each pixel.
// The hardware does not foresee so many lines: they are prefetched, those of pixels `ahead` of these; pixels of the
// next row follow those of this one.
PK_INLINE void transposed(const PaddedRow& row, int64_t i, int64_t from, __mmask32 some, int64_t ahead,
                          __m512i (&v)[kQuadLanes]) {
  const uint16_t* const pixels = row.pixels + (i - row.left) * row.pixel + from;
  const int64_t begin = row.left - i, end = begin + row.count;
  PK_UNROLL for (int p = 0; p < kQuadLanes; ++p) __builtin_prefetch(pixels + (p + ahead) * row.pixel);
  if (begin <= 0 && end >= kQuadLanes)
    PK_UNROLL for (int p = 0; p < kQuadLanes; ++p) v[p] = _mm512_maskz_loadu_epi16(some, pixels + p * row.pixel);
  else
    PK_UNROLL for (int p = 0; p < kQuadLanes; ++p) v[p] =
        p >= begin && p < end ? _mm512_maskz_loadu_epi16(some, pixels + p * row.pixel) : _mm512_setzero_si512();
  transpose(v);
}

__mmask32 first_channels(int64_t count) { return count >= 2 * kQuadLanes ? ~0u : (1u << count) - 1; }

// Up to kQuadLanes vectors, each to its plane. kStep: planes from one to the next, where places are null.
template <int kStep, typename T>
PK_INLINE void store(const __m512i (&v)[kQuadLanes], int64_t count, __mmask16 here, const int32_t* places, T* to,
                     int64_t plane) {
  if (places) PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) {
      if (kStep * k < count && places[kStep * k] >= 0)
        _mm512_mask_storeu_epi32(to + places[kStep * k] * plane, here, v[k]);
    }
  else if (count > kStep * (kQuadLanes - 1))
    PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) _mm512_mask_storeu_epi32(to + kStep * k * plane, here, v[k]);
  else
    PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) if (kStep * k < count)
        _mm512_mask_storeu_epi32(to + kStep * k * plane, here, v[k]);
}

void to_pair_planes(const PaddedRow& row, int64_t pairs, const int32_t* places, uint32_t* to, int64_t plane) {
  const int64_t length = row.length();
  for (int64_t i = 0; i < length; i += kQuadLanes)
    for (int64_t j = 0; j < pairs; j += kQuadLanes) {
      __m512i v[kQuadLanes];
      transposed(row, i, 2 * j, first_channels(2 * (pairs - j)), kQuadLanes, v);
      store<1>(v, pairs - j, first(length - i), places ? places + j : nullptr, to + (places ? 0 : j * plane) + i,
               plane);
    }
}

// Words of two pixels each, from words of two channels each.
void to_planes(const PaddedRow& row, int64_t channels, const int32_t* places, uint16_t* to, int64_t plane) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  const int64_t length = row.length();
  for (int64_t i = 0; i < length; i += 2 * kQuadLanes)
    for (int64_t c = 0; c < channels; c += 2 * kQuadLanes) {
      const __mmask16 here = first((length - i + 1) / 2);
      const __mmask32 some = first_channels(channels - c);
      __m512i a[kQuadLanes], b[kQuadLanes];
      transposed(row, i, c, some, 2 * kQuadLanes, a);
      if (length - i > kQuadLanes)
        transposed(row, i + kQuadLanes, c, some, 2 * kQuadLanes, b);
      else
        PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) b[k] = _mm512_setzero_si512();
      PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) {
        const __m512i both = a[k];
        a[k] = _mm512_permutex2var_epi16(both, even, b[k]);
        b[k] = _mm512_permutex2var_epi16(both, odd, b[k]);
      }
      uint16_t* const y = to + (places ? 0 : c * plane) + i;
      store<2>(a, channels - c, here, places ? places + c : nullptr, y, plane);
      store<2>(b, channels - c - 1, here, places ? places + c + 1 : nullptr, y + (places ? 0 : plane), plane);
    }
}

void to_pixels(const uint32_t* from, int64_t plane, int64_t pairs, int64_t count, uint16_t* to, int64_t pixel) {
  for (int64_t j = 0; j < pairs; j += kQuadLanes)
    for (int64_t i = 0; i < count; i += kQuadLanes) {
      __m512i v[kQuadLanes];
      PK_UNROLL for (int k = 0; k < kQuadLanes; ++k) v[k] = _mm512_loadu_si512(from + (j + k) * plane + i);
      transpose(v);
      uint16_t* const y = to + i * pixel + 2 * j;
      if (count - i >= kQuadLanes)
        PK_UNROLL for (int p = 0; p < kQuadLanes; ++p) _mm512_storeu_si512(y + p * pixel, v[p]);
      else
        PK_UNROLL for (int p = 0; p < kQuadLanes; ++p) if (i + p < count) _mm512_storeu_si512(y + p * pixel, v[p]);
    }
}

template <int... kNumbers>
void fill(QuadKernels& kernels, std::integer_sequence<int, kNumbers...>) {
  ((kernels.conv[kNumbers + 1] = conv<kNumbers + 1>), ...);
  ((kernels.dots[kNumbers + 1] = dots<kNumbers + 1>), ...);
}

}  // namespace

QuadKernels quad_kernels_avx512bf16() {
  QuadKernels kernels{};
  fill(kernels, std::make_integer_sequence<int, kQuadVectors>());
  kernels.to_pair_planes = to_pair_planes, kernels.to_planes = to_planes, kernels.to_pixels = to_pixels;
  return kernels;
}

}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
