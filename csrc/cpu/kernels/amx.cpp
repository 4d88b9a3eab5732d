// The amx rows of kernel_table.inc.
#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/pixel_kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "cpu/kernels/amx_pixels.h"

namespace prunekernels {
namespace {

// Assembler, since a compiler may move stores across its intrinsics (g++ 12) and takes no template argument in them.
struct AmxInstructions {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSums, int kA, int kB>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
  }
  template <int kVectors>
  static void narrow(const float* sums, uint32_t lanes, uint16_t* y) {
    if constexpr (kVectors == 2) {
      const __m512bh v = _mm512_maskz_cvtne2ps_pbh(lanes, _mm512_load_ps(sums + 16), _mm512_load_ps(sums));
      _mm512_storeu_si512(y, reinterpret_cast<__m512i>(v));
    } else {
      const __m256bh v = _mm512_maskz_cvtneps_pbh(static_cast<__mmask16>(lanes), _mm512_load_ps(sums));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), reinterpret_cast<__m256i>(v));
    }
  }
};

}  // namespace

PixelKernels pixel_kernels_amx() { return AmxPixels<AmxInstructions>::table(); }

}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
