// A vector of floats and the operations that the microkernels need, one struct for each instruction set. Include inside
// a region that is compiled for that instruction set. load_first and store_first touch the first `count` lanes only,
// load_between and store_between lanes begin..end, which may lie outside of the vector. keep_first makes lanes after
// the first `count` 0, keep_lanes those whose bit is not set.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prunekernels {

#define PK_INLINE __attribute__((always_inline)) static inline
#define PK_UNROLL _Pragma("GCC unroll 16")

struct ScalarFloat {
  using Vector = float;
  static constexpr int kLanes = 1;
  static constexpr int kRegisters = 16;

  PK_INLINE Vector zero() { return 0; }
  PK_INLINE Vector set(float value) { return value; }
  PK_INLINE Vector load(const float* p) { return *p; }
  PK_INLINE void store(float* p, Vector v) { *p = v; }
  PK_INLINE Vector load_first(const float* p, int) { return *p; }
  PK_INLINE void store_first(float* p, Vector v, int) { *p = v; }
  PK_INLINE Vector load_between(const float* p, int begin, int end) { return begin <= 0 && end > 0 ? *p : 0; }
  PK_INLINE void store_between(float* p, Vector v, int begin, int end) {
    if (begin <= 0 && end > 0) *p = v;
  }
  PK_INLINE Vector keep_first(Vector v, int) { return v; }
  PK_INLINE bool lanes(uint32_t bits) { return bits & 1; }
  PK_INLINE Vector keep_lanes(Vector v, bool lanes) { return lanes ? v : 0; }
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  PK_INLINE float sum(Vector v) { return v; }
  PK_INLINE void keep(Vector&) {}
  PK_INLINE void split(const float* p, Vector& even, Vector& odd) { even = p[0], odd = p[1]; }
  PK_INLINE void merge(float* p, Vector even, Vector odd) { p[0] = even, p[1] = odd; }
  PK_INLINE void transpose(Vector (&)[1]) {}
};

#if defined(PK_AVX2)

struct Avx2Float {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  PK_INLINE __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  PK_INLINE __m256 swap_middle(__m256 v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0b11011000));
  }
  PK_INLINE Vector zero() { return _mm256_setzero_ps(); }
  PK_INLINE Vector set(float value) { return _mm256_set1_ps(value); }
  PK_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
  PK_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  PK_INLINE Vector load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  PK_INLINE void store_first(float* p, Vector v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  PK_INLINE __m256i between(int begin, int end) { return _mm256_andnot_si256(first(begin), first(end)); }
  PK_INLINE Vector load_between(const float* p, int begin, int end) {
    return _mm256_maskload_ps(p, between(begin, end));
  }
  PK_INLINE void store_between(float* p, Vector v, int begin, int end) {
    _mm256_maskstore_ps(p, between(begin, end), v);
  }
  PK_INLINE Vector keep_first(Vector v, int count) { return _mm256_and_ps(v, _mm256_castsi256_ps(first(count))); }
  PK_INLINE __m256i lanes(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
  }
  PK_INLINE Vector keep_lanes(Vector v, __m256i lanes) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes)); }
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  PK_INLINE float sum(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // Keeps v in a register: else the compiler may load it again for each use, and loads are what limits these kernels.
  PK_INLINE void keep(Vector& v) { asm("" : "+x"(v)); }
  PK_INLINE void split(const float* p, Vector& even, Vector& odd) {
    const __m256 a = load(p), b = load(p + 8);
    even = swap_middle(_mm256_shuffle_ps(a, b, 0b10001000));
    odd = swap_middle(_mm256_shuffle_ps(a, b, 0b11011101));
  }
  PK_INLINE void merge(float* p, Vector even, Vector odd) {
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    store(p, _mm256_permute2f128_ps(low, high, 0x20));
    store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  PK_INLINE void transpose(Vector (&v)[8]) {
    Vector a[8], b[8];
    PK_UNROLL for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    PK_UNROLL for (int i = 0; i < 8; i += 4) {
      PK_UNROLL for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0b01000100);
        b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0b11101110);
      }
    }
    PK_UNROLL for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
};

#endif

#if defined(PK_AVX512)

struct Avx512Float {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;

  PK_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  PK_INLINE Vector zero() { return _mm512_setzero_ps(); }
  PK_INLINE Vector set(float value) { return _mm512_set1_ps(value); }
  PK_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  PK_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  PK_INLINE Vector load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  PK_INLINE void store_first(float* p, Vector v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  PK_INLINE __mmask16 between(int begin, int end) {
    const auto clamped = [](int i) { return i < 0 ? 0 : i > kLanes ? kLanes : i; };
    return static_cast<__mmask16>(first(clamped(end)) & ~first(clamped(begin)));
  }
  PK_INLINE Vector load_between(const float* p, int begin, int end) {
    return _mm512_maskz_loadu_ps(between(begin, end), p);
  }
  PK_INLINE void store_between(float* p, Vector v, int begin, int end) {
    _mm512_mask_storeu_ps(p, between(begin, end), v);
  }
  PK_INLINE Vector keep_first(Vector v, int count) { return _mm512_maskz_mov_ps(first(count), v); }
  PK_INLINE __mmask16 lanes(uint32_t bits) { return static_cast<__mmask16>(bits); }
  PK_INLINE Vector keep_lanes(Vector v, __mmask16 lanes) { return _mm512_maskz_mov_ps(lanes, v); }
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  PK_INLINE float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  // Lane i of the result: the sum of v[i]. Each level halves the number of vectors and doubles the sums in each.
  PK_INLINE Vector sums(Vector (&v)[16]) {
    PK_UNROLL for (int i = 0; i < 8; ++i) v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0b01000100),
                                                               _mm512_shuffle_f32x4(v[i], v[i + 8], 0b11101110));
    PK_UNROLL for (int i = 0; i < 4; ++i) v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0b10001000),
                                                               _mm512_shuffle_f32x4(v[i], v[i + 4], 0b11011101));
    // Quarters: of vectors i, i + 8, i + 4, i + 12.
    PK_UNROLL for (int i = 0; i < 2; ++i) v[i] =
        _mm512_add_ps(_mm512_shuffle_ps(v[i], v[i + 2], 0b01000100), _mm512_shuffle_ps(v[i], v[i + 2], 0b11101110));
    v[0] = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0b10001000), _mm512_shuffle_ps(v[0], v[1], 0b11011101));
    // Lane 4 q + l: vector {0, 8, 4, 12}[q] + {0, 2, 1, 3}[l].
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), v[0]);
  }
  PK_INLINE __m512i places(const int32_t* order, int count) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1 << count) - 1), order);
  }
  PK_INLINE Vector permute(Vector v, __m512i places) { return _mm512_permutexvar_ps(places, v); }
  PK_INLINE void keep(Vector& v) { asm("" : "+v"(v)); }
  PK_INLINE void split(const float* p, Vector& even, Vector& odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 a = load(p), b = load(p + 16);
    even = _mm512_permutex2var_ps(a, evens, b);
    odd = _mm512_permutex2var_ps(a, odds, b);
  }
  PK_INLINE void merge(float* p, Vector even, Vector odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    store(p, _mm512_permutex2var_ps(even, low, odd));
    store(p + 16, _mm512_permutex2var_ps(even, high, odd));
  }
  PK_INLINE void transpose(Vector (&v)[16]) {
    Vector a[16], b[16];
    PK_UNROLL for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    PK_UNROLL for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of each quarter of rows i..i + 3
      PK_UNROLL for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0b01000100);
        b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0b11101110);
      }
    }
    PK_UNROLL for (int j = 0; j < 4; ++j) {  // quarters 0 and 2, then 1 and 3
      a[j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0b10001000);
      a[4 + j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0b11011101);
      a[8 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0b10001000);
      a[12 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0b11011101);
    }
    PK_UNROLL for (int j = 0; j < 4; ++j) {
      v[j] = _mm512_shuffle_f32x4(a[j], a[8 + j], 0b10001000);
      v[8 + j] = _mm512_shuffle_f32x4(a[j], a[8 + j], 0b11011101);
      v[4 + j] = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0b10001000);
      v[12 + j] = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0b11011101);
    }
  }
};

#endif

}  // namespace prunekernels
