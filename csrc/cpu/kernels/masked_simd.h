// A vector of elements with a mask of its live lanes, one struct for each instruction set: for passes over rows of
// which some elements are dead. Include inside a region that is compiled for that instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/scalar_types.h"
#include "cpu/kernels/simd.h"

namespace prunekernels {

// One lane. Every result is rounded to T, as torch's elementwise operators do it.
template <typename T>
struct MaskedScalar {
  using Element = T;
  using Wide = MaskedScalar<typename Arithmetic<T>::type>;  // for sums
  using Vector = typename Arithmetic<T>::type;
  using Mask = bool;
  static constexpr int kLanes = 1;

  PK_INLINE Vector rounded(Vector value) { return static_cast<Vector>(Arithmetic<T>::narrow(value)); }
  PK_INLINE Mask mask(uint32_t bits) { return bits & 1; }  // the lowest kLanes bits
  PK_INLINE Vector set(Vector value) { return value; }
  PK_INLINE Vector only(Vector v, Mask mask) { return mask ? v : Vector{}; }
  PK_INLINE Vector load(const T* p) { return static_cast<Vector>(*p); }
  PK_INLINE Vector load(const T* p, Mask mask) { return mask ? static_cast<Vector>(*p) : Vector{}; }
  PK_INLINE void store(T* p, Vector v) { *p = Arithmetic<T>::narrow(v); }
  PK_INLINE void store(T* p, Vector v, Mask mask) {
    if (mask) *p = Arithmetic<T>::narrow(v);
  }
  PK_INLINE bool any(Mask mask) { return mask; }
  PK_INLINE Vector choose(Mask mask, Vector a, Vector b) { return mask ? a : b; }
  // Products of 16-bit floats are exact in float.
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) {
    if constexpr (std::is_same_v<T, Vector>)
      return std::fma(a, b, c);
    else
      return rounded(a * b + c);
  }
  PK_INLINE Vector add(Vector a, Vector b) { return rounded(a + b); }
  PK_INLINE Vector sub(Vector a, Vector b) { return rounded(a - b); }
  PK_INLINE Vector mul(Vector a, Vector b) { return rounded(a * b); }
  PK_INLINE Vector div(Vector a, Vector b) { return rounded(a / b); }
  PK_INLINE Vector sqrt(Vector a) { return rounded(std::sqrt(a)); }
  PK_INLINE Vector abs(Vector a) { return std::fabs(a); }
  PK_INLINE Vector sum(Vector v) { return v; }
};

#if defined(PK_AVX2)

struct MaskedAvx2 {
  using Element = float;
  using Wide = MaskedAvx2;
  using Vector = __m256;
  using Mask = __m256i;
  static constexpr int kLanes = 8;

  PK_INLINE Vector rounded(Vector v) { return v; }
  PK_INLINE Mask mask(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
  }
  PK_INLINE Vector set(float value) { return _mm256_set1_ps(value); }
  PK_INLINE Vector only(Vector v, Mask mask) { return _mm256_and_ps(v, _mm256_castsi256_ps(mask)); }
  PK_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
  PK_INLINE Vector load(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
  PK_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  PK_INLINE void store(float* p, Vector v, Mask mask) { _mm256_maskstore_ps(p, mask, v); }
  PK_INLINE bool any(Mask) { return true; }
  PK_INLINE Vector choose(Mask mask, Vector a, Vector b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask)); }
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  PK_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  PK_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  PK_INLINE Vector mul(Vector a, Vector b) {  // the compiler must not make it and a later sum one fma
    Vector product = _mm256_mul_ps(a, b);
    asm("" : "+x"(product));
    return product;
  }
  PK_INLINE Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
  PK_INLINE Vector sqrt(Vector a) { return _mm256_sqrt_ps(a); }
  PK_INLINE Vector abs(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  PK_INLINE float sum(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#endif

#if defined(PK_AVX512)

struct MaskedAvx512 {
  using Element = float;
  using Wide = MaskedAvx512;
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  PK_INLINE Vector rounded(Vector v) { return v; }
  PK_INLINE Mask mask(uint32_t bits) { return static_cast<Mask>(bits); }
  PK_INLINE Vector set(float value) { return _mm512_set1_ps(value); }
  PK_INLINE Vector only(Vector v, Mask mask) { return _mm512_maskz_mov_ps(mask, v); }
  PK_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  PK_INLINE Vector load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
  PK_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  PK_INLINE void store(float* p, Vector v, Mask mask) { _mm512_mask_storeu_ps(p, mask, v); }
  PK_INLINE bool any(Mask) { return true; }
  PK_INLINE Vector choose(Mask mask, Vector a, Vector b) { return _mm512_mask_mov_ps(b, mask, a); }
  PK_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  PK_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  PK_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  PK_INLINE Vector mul(Vector a, Vector b) {  // as in MaskedAvx2
    Vector product = _mm512_mul_ps(a, b);
    asm("" : "+v"(product));
    return product;
  }
  PK_INLINE Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  PK_INLINE Vector sqrt(Vector a) { return _mm512_sqrt_ps(a); }
  PK_INLINE Vector abs(Vector a) { return _mm512_abs_ps(a); }
  PK_INLINE float sum(Vector v) { return _mm512_reduce_add_ps(v); }
};

#endif

// Walks a row of `elements` vector by vector: visit.whole(i) where every element is live, visit.some(i, mask) where
// some are dead, visit.last(i, mask) at the end of the row, where a vector may reach past it. live: a bit per element;
// null: all live. One test serves 32 elements: with dead channels at random, a branch for each vector is mispredicted
// too often.
template <typename V, typename Visit>
PK_INLINE void each_vector(const uint32_t* live, int64_t elements, Visit& visit) {
  constexpr int kLanes = V::kLanes;
  int64_t i = 0;
  if (!live) {
    for (; i + kLanes <= elements; i += kLanes) visit.whole(i);
    if (i < elements) visit.last(i, V::mask((1u << (elements - i)) - 1));
    return;
  }
  for (; i + 32 <= elements; i += 32) {
    const uint32_t word = live[i >> 5];
    if (word == 0) continue;
    if (word == ~0u)
      for (int lane = 0; lane < 32; lane += kLanes) visit.whole(i + lane);
    else
      for (int lane = 0; lane < 32; lane += kLanes) visit.some(i + lane, V::mask(word >> lane));
  }
  if (i == elements) return;
  for (uint32_t word = live[i >> 5]; word; i += kLanes, word >>= kLanes) visit.last(i, V::mask(word));
}

}  // namespace prunekernels
