#include "cpu/kernels/tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PK_AVX2
#include "cpu/kernels/tiles_impl.h"

namespace prunekernels {
TileKernels tile_kernels_avx2() { return Tiles<Avx2Float>::table(); }
}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // the table's x86 rows exist everywhere, but isa() never allows them here

namespace prunekernels {
TileKernels tile_kernels_avx2() { return {}; }
}  // namespace prunekernels

#endif
