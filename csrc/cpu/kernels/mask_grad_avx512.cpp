#include "cpu/kernels/mask_grad.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

#define PK_AVX512
#include "cpu/kernels/mask_grad_impl.h"

namespace prunekernels {
MaskGradKernels mask_grad_kernels_avx512() { return mask_grad_kernels_of<Avx512Lanes>(); }
}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // the table's x86 rows exist everywhere, but isa() never allows them here

namespace prunekernels {
MaskGradKernels mask_grad_kernels_avx512() { return {}; }
}  // namespace prunekernels

#endif
