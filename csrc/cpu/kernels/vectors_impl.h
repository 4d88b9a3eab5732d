// Vectors of floats, and how float and bfloat16 elements become them. Included by the loops that are compiled for each
// instruction set, in their namespace.
#pragma once

constexpr int kVector = 16;

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kVector)));

template <typename V, typename T>
inline V bits_at(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline Vector load(const float* p) { return bits_at<Vector>(p); }

inline void store(Vector v, float* p) { __builtin_memcpy(p, &v, sizeof(v)); }

// Intrinsics, since g++ 12 makes three times as many instructions of the same in vectors.
#if defined(PK_AVX512)
inline Vector load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#else
inline Vector load(const BFloat16* p) {
  return reinterpret_cast<Vector>(__builtin_convertvector(bits_at<Shorts>(p), Words) << 16);
}
#endif

#if defined(PK_AVX512BF16)
inline void store(Vector v, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
#else
// As BFloat16::from does it.
inline void store(Vector v, BFloat16* p) {
  const Words bits = reinterpret_cast<Words>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words is_number = reinterpret_cast<Words>(v == v);
  const Words narrow = (rounded & is_number) | ((bits >> 16 | 0x40) & ~is_number);
#if defined(PK_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(narrow)));
#else
  const Shorts shorts = __builtin_convertvector(narrow, Shorts);
  __builtin_memcpy(p, &shorts, sizeof(shorts));
#endif
}
#endif

template <typename T>
inline T element(float value) {
  return Arithmetic<T>::narrow(value);
}
