// The avx512bf16 rows of kernel_table.inc.
#include "cpu/kernels/pixel_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt")
#endif

namespace prunekernels {
namespace {

#define PK_UNROLL _Pragma("GCC unroll 16")

__m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__m512i broadcast(const char* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

__m256i narrowed(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

// Pixels are addressed from every third on: a base register serves three of them.
template <int kPixels, int kVectors>
void conv(const PixelTile& t) {
  __m512 sum[kPixels][kVectors];
  PK_UNROLL for (int p = 0; p < kPixels; ++p)
    PK_UNROLL for (int v = 0; v < kVectors; ++v) sum[p][v] = _mm512_loadu_ps(t.start + 16 * v);
  const uint32_t* w = t.weights;
  const int64_t step = t.x_pixel * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const char* x[(kPixels + 2) / 3];
    PK_UNROLL for (int i = 0; i < (kPixels + 2) / 3; ++i)
      x[i] = reinterpret_cast<const char*>(t.x + t.taps[tap]) + 3 * i * step;
    for (int64_t j = 0; j < t.pairs; ++j) {
      __m512i weight[kVectors];
      PK_UNROLL for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(w + 16 * v);
      PK_UNROLL for (int p = 0; p < kPixels; ++p) {
        const __m512i pair = broadcast(x[p / 3] + p % 3 * step + 4 * j);
        PK_UNROLL for (int v = 0; v < kVectors; ++v) sum[p][v] = dot(sum[p][v], weight[v], pair);
      }
      w += kPixelBlock;
    }
  }
  PK_UNROLL for (int p = 0; p < kPixels; ++p)
    PK_UNROLL for (int v = 0; v < kVectors; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.y + p * t.y_pixel + 16 * v), narrowed(sum[p][v]));
}

template <int kFilters>
void dots(const PixelDots& d) {
  __m512 sum[kFilters][2];
  PK_UNROLL for (int f = 0; f < kFilters; ++f)
    PK_UNROLL for (int v = 0; v < 2; ++v) sum[f][v] = _mm512_loadu_ps(d.out + f * d.out_filter + 16 * v);
  for (int64_t row = 0; row < d.rows; ++row) {
    const uint32_t *g = d.g + row * d.g_row, *x = d.x + row * d.x_row;
    for (int64_t j = 0; j < d.pairs; ++j, g += d.g_pair, x += d.x_pair) {
      const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + 16);
      PK_UNROLL for (int f = 0; f < kFilters; ++f) {
        const __m512i pair = broadcast(reinterpret_cast<const char*>(g + f));
        sum[f][0] = dot(sum[f][0], first, pair), sum[f][1] = dot(sum[f][1], second, pair);
      }
    }
  }
  PK_UNROLL for (int f = 0; f < kFilters; ++f)
    PK_UNROLL for (int v = 0; v < 2; ++v) _mm512_storeu_ps(d.out + f * d.out_filter + 16 * v, sum[f][v]);
}

__mmask32 first(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// No store touches anything beyond a pixel's to_pixel elements.
void gather(const uint16_t* from, int64_t channels, const uint64_t* bits, int64_t live, uint16_t* to, int64_t to_pixel,
            int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, from += channels, to += to_pixel) {
    int64_t at = 0;
    for (int64_t c = 0; c < channels; c += 32) {
      const auto mask = static_cast<__mmask32>(bits[c >> 6] >> (c & 63));
      const __m512i v = _mm512_maskz_loadu_epi16(mask & first(channels - c), from + c);
      _mm512_mask_storeu_epi16(to + at, first(to_pixel - at), _mm512_maskz_compress_epi16(mask, v));
      at += _mm_popcnt_u32(mask);
    }
    for (at = live; at < to_pixel; at += 32) _mm512_mask_storeu_epi16(to + at, first(to_pixel - at), _mm512_setzero_si512());
  }
}

void scatter(const uint16_t* from, int64_t from_pixel, const uint64_t* bits, uint16_t* to, int64_t channels,
             int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, from += from_pixel, to += channels) {
    const uint16_t* next = from;
    for (int64_t c = 0; c < channels; c += 32) {
      const auto mask = static_cast<__mmask32>(bits[c >> 6] >> (c & 63));
      const int count = _mm_popcnt_u32(mask);
      const __m512i v = _mm512_maskz_loadu_epi16(first(count), next);
      _mm512_mask_storeu_epi16(to + c, first(channels - c), _mm512_maskz_expand_epi16(mask, v));
      next += count;
    }
  }
}

void interleave(const uint16_t* a, const uint16_t* b, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(first(count - i));
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a + i));
    const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + i)) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(to + i, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

void narrow(const float* from, float scale, int64_t count, uint16_t* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(first(count - i));
    const __m512 v = scale == 0 ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), factor);
    _mm256_mask_storeu_epi16(to + i, mask, narrowed(v));
  }
}

template <int... kNumbers>
void fill(PixelKernels& kernels, std::integer_sequence<int, kNumbers...>) {
  ((kernels.conv[kNumbers + 1] = conv<kNumbers + 1, 2>), ...);
  ((kernels.conv_half[kNumbers + 1] = conv<kNumbers + 1, 1>), ...);
  ((kernels.dots[kNumbers + 1] = dots<kNumbers + 1>), ...);
}

}  // namespace

PixelKernels pixel_kernels_avx512bf16() {
  PixelKernels kernels{};
  fill(kernels, std::make_integer_sequence<int, kMostPixels>());
  kernels.gather = gather, kernels.scatter = scatter, kernels.interleave = interleave, kernels.narrow = narrow;
  return kernels;
}

}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
