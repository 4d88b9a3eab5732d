// NHWC gather and scatter, pixel by pixel. The live list comes as a bit per channel; compress and expand instructions
// close and open the gaps of one vector of channels. Tails are masked loads and stores: nothing beyond a pixel is
// touched, so that threads may work on neighbouring pixels.
#include "cpu/kernels/channel_copy.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prunekernels {
namespace {

template <typename T>
void gather_pixels_scalar(const char* from, char* to, int64_t begin, int64_t end, const ChannelList& list) {
  const T* full = reinterpret_cast<const T*>(from);
  T* compact = reinterpret_cast<T*>(to);
  for (int64_t p = begin; p < end; ++p)
    for (int64_t j = 0; j < list.live; ++j) {
      const int32_t c = list.index[j];
      compact[p * list.live + j] = c < 0 ? T(0) : full[p * list.channels + c];
    }
}

template <typename T>
void scatter_pixels_scalar(const char* from, char* to, int64_t begin, int64_t end, const ChannelList& list) {
  const T* compact = reinterpret_cast<const T*>(from);
  T* full = reinterpret_cast<T*>(to);
  for (int64_t p = begin; p < end; ++p)
    for (int64_t c = 0; c < list.channels; ++c) {
      const int32_t j = list.slot[c];
      full[p * list.channels + c] = j < 0 ? T(0) : compact[p * list.live + j];
    }
}

}  // namespace

#define PK_SCALAR(bits)                                                                        \
  void gather_pixels_b##bits##_scalar(const char* from, char* to, int64_t begin, int64_t end,  \
                                      const ChannelList& list) {                               \
    gather_pixels_scalar<uint##bits##_t>(from, to, begin, end, list);                          \
  }                                                                                            \
  void scatter_pixels_b##bits##_scalar(const char* from, char* to, int64_t begin, int64_t end, \
                                       const ChannelList& list) {                              \
    scatter_pixels_scalar<uint##bits##_t>(from, to, begin, end, list);                         \
  }
PK_SCALAR(16)
PK_SCALAR(32)
PK_SCALAR(64)
#undef PK_SCALAR

#if defined(__x86_64__)

#define PK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt,bmi2")))
#define PK_AVX512VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt,bmi2")))

// One body for all element widths; the intrinsics differ by suffix only. LANES divides 64, so a vector's mask lies in
// one word of bits. A macro, since lambdas in a function template do not inherit its target attribute (g++ 12).
// Stores are whole vectors wherever these end before the range does, as masked ones take several times as long on some
// CPUs: the next chunk or pixel overwrites what is too much. Loads are whole ones within a pixel: what masked ones read
// is not fetched ahead, which takes twice as long from memory.
#define PK_COMPRESS(bits_per_element, isa, TARGET, LANES, MASK, SUFFIX)                                            \
  TARGET void gather_pixels_b##bits_per_element##_##isa(const char* from, char* to, int64_t begin, int64_t end,    \
                                                        const ChannelList& list) {                                 \
    using T = uint##bits_per_element##_t;                                                                          \
    constexpr uint64_t kAll = LANES == 64 ? ~0ull : (1ull << LANES) - 1;                                           \
    const T* const stop = reinterpret_cast<const T*>(to) + end * list.live;                                        \
    for (int64_t p = begin; p < end; ++p) {                                                                        \
      const T* full = reinterpret_cast<const T*>(from) + p * list.channels;                                        \
      T* compact = reinterpret_cast<T*>(to) + p * list.live;                                                       \
      for (int64_t c = 0; c < list.channels; c += LANES) {                                                         \
        const uint64_t live = list.bits[c >> 6] >> (c & 63) & kAll;                                                \
        const int count = __builtin_popcountll(live);                                                              \
        const bool whole = list.channels - c >= LANES;                                                             \
        const __m512i v =                                                                                          \
            whole ? _mm512_loadu_si512(full + c) : _mm512_maskz_loadu_##SUFFIX(static_cast<MASK>(live), full + c); \
        const __m512i packed = _mm512_maskz_compress_##SUFFIX(static_cast<MASK>(live), v);                         \
        if (stop - compact >= LANES)                                                                               \
          _mm512_storeu_si512(compact, packed);                                                                    \
        else                                                                                                       \
          _mm512_mask_storeu_##SUFFIX(compact, static_cast<MASK>((1ull << count) - 1), packed);                    \
        compact += count;                                                                                          \
      }                                                                                                            \
    }                                                                                                              \
  }                                                                                                                \
  TARGET void scatter_pixels_b##bits_per_element##_##isa(const char* from, char* to, int64_t begin, int64_t end,   \
                                                         const ChannelList& list) {                                \
    using T = uint##bits_per_element##_t;                                                                          \
    constexpr uint64_t kAll = LANES == 64 ? ~0ull : (1ull << LANES) - 1;                                           \
    const T* const stop = reinterpret_cast<const T*>(to) + end * list.channels;                                    \
    for (int64_t p = begin; p < end; ++p) {                                                                        \
      const T* compact = reinterpret_cast<const T*>(from) + p * list.live;                                         \
      T* full = reinterpret_cast<T*>(to) + p * list.channels;                                                      \
      for (int64_t c = 0; c < list.channels; c += LANES) {                                                         \
        const uint64_t live = list.bits[c >> 6] >> (c & 63) & kAll;                                                \
        const int count = __builtin_popcountll(live);                                                              \
        const __m512i packed = _mm512_maskz_loadu_##SUFFIX(static_cast<MASK>((1ull << count) - 1), compact);       \
        const __m512i v = _mm512_maskz_expand_##SUFFIX(static_cast<MASK>(live), packed);                           \
        if (stop - (full + c) >= LANES)                                                                            \
          _mm512_storeu_si512(full + c, v);                                                                        \
        else                                                                                                       \
          _mm512_mask_storeu_##SUFFIX(full + c, static_cast<MASK>((1ull << (list.channels - c)) - 1), v);          \
        compact += count;                                                                                          \
      }                                                                                                            \
    }                                                                                                              \
  }
PK_COMPRESS(16, avx512vbmi2, PK_AVX512VBMI2, 32, __mmask32, epi16)
PK_COMPRESS(32, avx512, PK_AVX512, 16, __mmask16, epi32)
PK_COMPRESS(64, avx512, PK_AVX512, 8, __mmask8, epi64)
#undef PK_COMPRESS

namespace {

struct Permutations {  // of 8 lanes, by the byte whose bits say which lanes are live
  std::array<std::array<int32_t, 8>, 256> compress{}, expand{};
  constexpr Permutations() {
    for (int live = 0; live < 256; ++live)
      for (int lane = 0, next = 0; lane < 8; ++lane) {
        if (!(live >> lane & 1)) continue;
        expand[live][lane] = next;
        compress[live][next++] = lane;
      }
  }
};
constexpr Permutations kPermutations;

constexpr int32_t kPrefix[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

__attribute__((target("avx2"))) __m256i first_lanes(int count) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPrefix + 8 - count));
}

__attribute__((target("avx2"))) __m256i load_lanes(const std::array<int32_t, 8>& lanes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes.data()));
}

// -1 in the lanes whose bit is set.
__attribute__((target("avx2"))) __m256i live_lanes(int live) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(live), bit), bit);
}

}  // namespace

__attribute__((target("avx2,popcnt"))) void gather_pixels_b32_avx2(const char* from, char* to, int64_t begin,
                                                                   int64_t end, const ChannelList& list) {
  for (int64_t p = begin; p < end; ++p) {
    const int* full = reinterpret_cast<const int*>(from) + p * list.channels;
    int* compact = reinterpret_cast<int*>(to) + p * list.live;
    for (int64_t c = 0; c < list.channels; c += 8) {
      const int live = static_cast<int>(list.bits[c >> 6] >> (c & 63) & 255), count = __builtin_popcount(live);
      const __m256i v = _mm256_maskload_epi32(full + c, live_lanes(live));
      _mm256_maskstore_epi32(compact, first_lanes(count),
                             _mm256_permutevar8x32_epi32(v, load_lanes(kPermutations.compress[live])));
      compact += count;
    }
  }
}

__attribute__((target("avx2,popcnt"))) void scatter_pixels_b32_avx2(const char* from, char* to, int64_t begin,
                                                                    int64_t end, const ChannelList& list) {
  for (int64_t p = begin; p < end; ++p) {
    const int* compact = reinterpret_cast<const int*>(from) + p * list.live;
    int* full = reinterpret_cast<int*>(to) + p * list.channels;
    for (int64_t c = 0; c < list.channels; c += 8) {
      const int live = static_cast<int>(list.bits[c >> 6] >> (c & 63) & 255), count = __builtin_popcount(live);
      const __m256i v = _mm256_maskload_epi32(compact, first_lanes(count));
      const __m256i spread = _mm256_permutevar8x32_epi32(v, load_lanes(kPermutations.expand[live]));
      const int64_t left = list.channels - c;
      _mm256_maskstore_epi32(full + c, first_lanes(left < 8 ? static_cast<int>(left) : 8),
                             _mm256_and_si256(spread, live_lanes(live)));
      compact += count;
    }
  }
}

#endif

}  // namespace prunekernels
