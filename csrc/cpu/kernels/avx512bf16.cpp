// The avx512bf16 rows of kernel_table.inc.
#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/cast.h"
#include "cpu/kernels/pixel_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
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

#define PK_UNROLL _Pragma("GCC unroll 32")

constexpr int kMost = 14;      // pixels or filters of a tile of two vectors: as many sums as registers hold
constexpr int kMostHalf = 28;  // pixels of one of half of the filters

__m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__m512i broadcast(const char* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

__m256i narrowed(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

// A sum waits for the last product that was added to it, so a few sums alone would leave time unused: small tiles have
// two of each.
template <int kRows, int kVectors>
struct Sums {
  static constexpr int kCount = kRows * kVectors > 12 ? 1 : 2;
  __m512 of[kCount][kRows][kVectors];

  void start(const float* from, int64_t row) {
    PK_UNROLL for (int r = 0; r < kRows; ++r) PK_UNROLL for (int v = 0; v < kVectors; ++v) {
      of[0][r][v] = _mm512_loadu_ps(from + r * row + 16 * v);
      if (kCount > 1) of[kCount - 1][r][v] = _mm512_setzero_ps();
    }
  }
  __m512 total(int r, int v) const {
    return kCount > 1 ? _mm512_add_ps(of[0][r][v], of[kCount - 1][r][v]) : of[0][r][v];
  }
};

// Pixels are addressed from every third on: a base register serves three of them.
template <int kPixels, int kVectors>
inline void add_pair(const char* const (&x)[(kPixels + 2) / 3], int64_t step, int64_t at, const uint32_t* w,
                     __m512 (&sum)[kPixels][kVectors]) {
  __m512i weight[kVectors];
  PK_UNROLL for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(w + 16 * v);
  PK_UNROLL for (int p = 0; p < kPixels; ++p) {
    const __m512i pair = broadcast(x[p / 3] + p % 3 * step + at);
    PK_UNROLL for (int v = 0; v < kVectors; ++v) sum[p][v] = dot(sum[p][v], weight[v], pair);
  }
}

template <int kPixels, int kVectors>
void conv(const PixelTile& t) {
  using All = Sums<kPixels, kVectors>;
  All sums;
  sums.start(t.start, 0);
  const uint32_t* w = t.weights;
  const int64_t step = t.x_pixel * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const char* x[(kPixels + 2) / 3];
    PK_UNROLL for (int i = 0; i < (kPixels + 2) / 3; ++i) x[i] =
        reinterpret_cast<const char*>(t.x + t.taps[tap]) + 3 * i * step;
    int64_t j = 0;
    for (; j + All::kCount <= t.pairs; j += All::kCount)
      PK_UNROLL for (int s = 0; s < All::kCount; ++s, w += kPixelBlock) add_pair(x, step, 4 * (j + s), w, sums.of[s]);
    for (; All::kCount > 1 && j < t.pairs; ++j, w += kPixelBlock) add_pair(x, step, 4 * j, w, sums.of[0]);
  }
  PK_UNROLL for (int p = 0; p < kPixels; ++p) PK_UNROLL for (int v = 0; v < kVectors; ++v) {
    const auto lanes = static_cast<__mmask16>(t.lanes >> 16 * v);
    const __m256bh y = _mm512_maskz_cvtneps_pbh(lanes, sums.total(p, v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.y + p * t.y_pixel + 16 * v), reinterpret_cast<__m256i>(y));
  }
}

template <int kFilters, int kVectors>
inline void add_pair(const uint32_t* g, const uint32_t* x, __m512 (&sum)[kFilters][kVectors]) {
  __m512i channels[kVectors];
  PK_UNROLL for (int v = 0; v < kVectors; ++v) channels[v] = _mm512_loadu_si512(x + 16 * v);
  PK_UNROLL for (int f = 0; f < kFilters; ++f) {
    const __m512i pair = broadcast(reinterpret_cast<const char*>(g + f));
    PK_UNROLL for (int v = 0; v < kVectors; ++v) sum[f][v] = dot(sum[f][v], channels[v], pair);
  }
}

template <int kFilters, int kVectors>
void dots(const PixelDots& d) {
  using All = Sums<kFilters, kVectors>;
  All sums;
  sums.start(d.out, d.out_filter);
  for (int64_t row = 0; row < d.rows; ++row) {
    const uint32_t *g = d.g + row * d.g_row, *x = d.x + row * d.x_row;
    int64_t j = 0;
    for (; j + All::kCount <= d.pairs; j += All::kCount)
      PK_UNROLL for (int s = 0; s < All::kCount; ++s, g += d.g_pair, x += d.x_pair) add_pair(g, x, sums.of[s]);
    if (All::kCount > 1 && j < d.pairs) add_pair(g, x, sums.of[0]);
  }
  PK_UNROLL for (int f = 0; f < kFilters; ++f) PK_UNROLL for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(d.out + f * d.out_filter + 16 * v, sums.total(f, v));
}

__mmask32 first(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

__m512i iota() {
  int16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<int16_t>(i);
  return _mm512_loadu_si512(lanes);
}

// What a vector of 32 channels holds of a list. Channels are moved by permutations: instructions that compress and
// expand wait for the last one that wrote the same register.
struct Chunk {
  __m512i from;  // of each lane of the result, where it comes from
  __mmask32 listed, filled;
  int32_t at, count;  // of its live channels: where they are in the list, and how many
};

constexpr int64_t kChunks = 128;  // that are prepared at a time

// Those from channel `begin` on, kChunks at most; returns how many. at: the channels of the list before them and,
// later, before the next ones.
int64_t prepare(const uint64_t* bits, int64_t begin, int64_t channels, bool spread, int64_t& at, Chunk* chunks) {
  int64_t count = 0;
  for (int64_t c = begin; c < channels && count < kChunks; c += 32) {
    const __mmask32 listed = static_cast<__mmask32>(bits[c >> 6] >> (c & 63)) & first(channels - c);
    const __m512i from =
        spread ? _mm512_maskz_expand_epi16(listed, iota()) : _mm512_maskz_compress_epi16(listed, iota());
    const int32_t live = _mm_popcnt_u32(listed);
    chunks[count++] = {from, listed, first(live), static_cast<int32_t>(at), live};
    at += live;
  }
  return count;
}

// Masked stores of 16-bit elements are slow, those of 32-bit ones are not.
void store_first(uint16_t* to, int64_t count, __m512i v) {
  if (count % 2)
    _mm512_mask_storeu_epi16(to, first(count), v);
  else
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(first(count / 2)), v);
}

// Of each of several pixels that lie `pixel` apart in a vector: these elements.
__mmask32 in_each(__mmask32 elements, int64_t pixel, int64_t pixels) {
  __mmask32 all = 0;
  for (int64_t p = 0; p < pixels; ++p) all |= elements << p * pixel;
  return all;
}

// Moves elements of small pixels, of which two or more fit into a vector: those of `taken` to `given`, as many, and
// zeros elsewhere. Stores are whole vectors, as below.
void move_small(const uint16_t* from, int64_t from_pixel, __mmask32 taken, uint16_t* to, int64_t to_pixel,
                __mmask32 given, int64_t pixels) {
  const int64_t group = 32 / std::max(from_pixel, to_pixel);
  const __mmask32 places = in_each(given, to_pixel, group);
  const __m512i lanes = _mm512_maskz_compress_epi16(in_each(taken, from_pixel, group), iota());
  const __m512i order = _mm512_maskz_expand_epi16(places, lanes);
  for (; pixels > 0; pixels -= group, from += group * from_pixel, to += group * to_pixel) {
    const int64_t count = std::min(pixels, group);
    const bool whole = pixels * from_pixel >= 32;
    const __m512i v = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(first(count * from_pixel), from);
    const __m512i moved = _mm512_maskz_permutexvar_epi16(places, order, v);
    if (pixels * to_pixel >= 32)
      _mm512_storeu_si512(to, moved);
    else
      store_first(to, count * to_pixel, moved);
  }
}

// One pixel. Loads are whole vectors if kWhole or of `left` channels: the CPU foresees no masked ones. So are
// stores if kWhole or up to `room`: what is behind a chunk's channels is overwritten by the next chunk, or pixel.
// Returns where zeros end.
template <bool kWhole>
int64_t gather_pixel(const uint16_t* x, int64_t left, const Chunk* chunks, int64_t count, uint16_t* y, int64_t room) {
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i, x += 32, left -= 32) {
    const Chunk& c = chunks[i];
    __m512i v = kWhole || left >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(c.listed, x);
    v = _mm512_maskz_permutexvar_epi16(c.filled, c.from, v);
    if (kWhole || c.at <= room)
      _mm512_storeu_si512(y + c.at, v), end = c.at + 32;
    else
      store_first(y + c.at, c.count, v), end = c.at + c.count;
  }
  return end;
}

void zero(uint16_t* y, int64_t begin, int64_t end) {
  for (; begin < end; begin += 32) store_first(y + begin, std::min<int64_t>(end - begin, 32), _mm512_setzero_si512());
}

void gather(const uint16_t* from, int64_t from_pixel, int64_t channels, const uint64_t* bits, int64_t live,
            uint16_t* to, int64_t to_pixel, int64_t pixels) {
  if (from_pixel == channels && 2 * std::max(channels, to_pixel) <= 32)
    return move_small(from, channels, static_cast<__mmask32>(bits[0]) & first(channels), to, to_pixel, first(live),
                      pixels);
  Chunk chunks[kChunks];
  int64_t at = 0;
  if (channels <= 32 * kChunks) {
    const int64_t count = prepare(bits, 0, channels, false, at, chunks);
    const uint16_t* x = from;
    if (32 * count <= from_pixel + channels && to_pixel <= chunks[count - 1].at + 32)  // the last chunk fills it up
      for (; pixels > 1 && pixels * to_pixel >= live + 32; --pixels, x += from_pixel, to += to_pixel)
        gather_pixel<true>(x, 0, chunks, count, to, 0);
    for (; pixels > 0; --pixels, x += from_pixel, to += to_pixel)
      zero(to, gather_pixel<false>(x, channels, chunks, count, to, pixels * to_pixel - 32), to_pixel);
    return;
  }
  for (int64_t begin = 0; begin < channels; begin += 32 * kChunks) {  // the next pass must find its pixels as they are
    const int64_t count = prepare(bits, begin, channels, false, at, chunks);
    for (int64_t p = 0; p < pixels; ++p)
      gather_pixel<false>(from + p * from_pixel + begin, channels - begin, chunks, count, to + p * to_pixel, -1);
  }
  for (int64_t p = 0; p < pixels; ++p) zero(to + p * to_pixel, live, to_pixel);
}

// One pixel. Stores are whole vectors if kWhole, or where that many channels are left.
template <bool kWhole>
void scatter_pixel(const uint16_t* x, const Chunk* chunks, int64_t count, uint16_t* y, int64_t left) {
  for (int64_t i = 0; i < count; ++i, y += 32, left -= 32) {
    const Chunk& c = chunks[i];
    const __m512i v = _mm512_maskz_permutexvar_epi16(c.listed, c.from, _mm512_loadu_si512(x + c.at));
    if (kWhole || left >= 32)
      _mm512_storeu_si512(y, v);
    else
      store_first(y, left, v);
  }
}

// Reads whole vectors, up to 31 elements behind the last pixel.
void scatter(const uint16_t* from, int64_t from_pixel, const uint64_t* bits, uint16_t* to, int64_t channels,
             int64_t pixels) {
  if (pixels > 1 && 2 * std::max(channels, from_pixel) <= 32) {
    const __mmask32 listed = static_cast<__mmask32>(bits[0]) & first(channels);
    return move_small(from, from_pixel, first(_mm_popcnt_u32(listed)), to, channels, listed, pixels);
  }
  Chunk chunks[kChunks];
  int64_t at = 0;
  for (int64_t begin = 0; begin < channels; begin += 32 * kChunks) {
    const int64_t count = prepare(bits, begin, channels, true, at, chunks), left = channels - begin;
    int64_t p = 0;
    if (channels <= 32 * kChunks)  // no other passes, whose channels would be overwritten
      for (; (pixels - p) * channels >= 32 * count; ++p)
        scatter_pixel<true>(from + p * from_pixel, chunks, count, to + p * channels, 0);
    for (; p < pixels; ++p) scatter_pixel<false>(from + p * from_pixel, chunks, count, to + p * channels + begin, left);
  }
}

// Four steps of a transposition of 16 x 16 numbers of 32 bits.
void transpose(__m512i (&v)[16]) {
  __m512i a[16];
  PK_UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  PK_UNROLL for (int i = 0; i < 16; i += 4)  // v[i + j]: column j of each quarter of rows i..i + 3
      PK_UNROLL for (int j = 0; j < 2; ++j) {
    v[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
    v[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
  }
  PK_UNROLL for (int j = 0; j < 4; ++j) {  // quarters 0 and 2, then 1 and 3
    a[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0b10001000);
    a[4 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0b11011101);
    a[8 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0b10001000);
    a[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0b11011101);
  }
  PK_UNROLL for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0b10001000);
    v[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0b11011101);
    v[4 + j] = _mm512_shuffle_i32x4(a[4 + j], a[12 + j], 0b10001000);
    v[12 + j] = _mm512_shuffle_i32x4(a[4 + j], a[12 + j], 0b11011101);
  }
}

void lanes(const uint16_t* rows, int64_t row, int64_t pairs, uint32_t* to) {
  for (int64_t j = 0; j < pairs; j += 16) {
    const auto mask = static_cast<__mmask16>(first(pairs - j < 16 ? pairs - j : 16));
    __m512i v[16];
    PK_UNROLL for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi32(mask, rows + i * row + 2 * j);
    transpose(v);
    for (int64_t i = 0; i < 16 && j + i < pairs; ++i) _mm512_storeu_si512(to + (j + i) * kPixelBlock, v[i]);
  }
}

// Of indices 0..31 of a vector and 32..63 of another: those that pairs begin, begin + 1, ... are made of.
__m512i pairs_of(int begin, int other) {
  return _mm512_add_epi32(
      _mm512_set1_epi32(begin | (other + begin) << 16),
      _mm512_mullo_epi32(_mm512_set1_epi32(1 << 16 | 1), _mm512_cvtepi16_epi32(_mm512_castsi512_si256(iota()))));
}

// Pixels of which two lie in a vector. Stores are whole vectors: the next pair overwrites what is too much.
void interleave_small(const uint16_t* from, int64_t from_pixel, int64_t pixels, int64_t count, uint32_t* to) {
  const __m512i pairs = pairs_of(0, static_cast<int>(from_pixel));
  for (; pixels > 1 && pixels / 2 * count >= 16; pixels -= 2, from += 2 * from_pixel, to += count)
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs, _mm512_loadu_si512(from)));
  for (; pixels > 0; pixels -= 2, from += 2 * from_pixel, to += count) {
    const __mmask32 there = pixels > 1 ? ~0u : 0x55555555;
    const __m512i v = _mm512_maskz_permutexvar_epi16(there, pairs, _mm512_loadu_si512(from));
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(first(count)), v);
  }
}

void interleave(const uint16_t* from, int64_t from_pixel, int64_t pixels, int64_t count, uint32_t* to) {
  if (from_pixel <= 16 && count <= 16) return interleave_small(from, from_pixel, pixels, count, to);
  const __m512i low = pairs_of(0, 32), high = pairs_of(16, 32);
  for (; pixels > 0; pixels -= 2, from += 2 * from_pixel, to += count) {
    const bool both = pixels > 1;
    const uint16_t* const other = from + from_pixel;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m512i a = _mm512_loadu_si512(from + i);
      const __m512i b = both ? _mm512_loadu_si512(other + i) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(a, high, b));
    }
    for (; i < count; i += 16) {
      const auto mask = static_cast<__mmask16>(first(count - i));
      const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, from + i));
      const __m512i b = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(both ? mask : 0, other + i));
      _mm512_mask_storeu_epi32(to + i, mask, _mm512_permutex2var_epi16(a, low, b));
    }
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
  ((kernels.dots[kNumbers + 1] = dots<kNumbers + 1, 2>), ...);
  ((kernels.dots_half[kNumbers + 1] = dots<kNumbers + 1, 1>), ...);
}

template <int... kNumbers>
void fill_half(PixelKernels& kernels, std::integer_sequence<int, kNumbers...>) {
  ((kernels.conv_half[kNumbers + 1] = conv<kNumbers + 1, 1>), ...);
}

}  // namespace

PixelKernels pixel_kernels_avx512bf16() {
  PixelKernels kernels{};
  kernels.most_pixels = kernels.most_filters = kMost, kernels.most_half_pixels = kMostHalf;
  fill(kernels, std::make_integer_sequence<int, kMost>());
  fill_half(kernels, std::make_integer_sequence<int, kMostHalf>());
  kernels.gather = gather, kernels.scatter = scatter;
  kernels.lanes = lanes, kernels.interleave = interleave, kernels.narrow = narrow;
  return kernels;
}

#define PK_AVX512
#define PK_AVX512BF16
namespace {
#include "cpu/kernels/batch_norm_impl.h"
#include "cpu/kernels/cast_impl.h"
}  // namespace

CastKernels cast_kernels_avx512bf16() { return cast_kernels_of_target(); }
NormKernels<BFloat16> norm_kernels_bf16_avx512bf16() { return norm_kernels_of_target<BFloat16>(); }

}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
