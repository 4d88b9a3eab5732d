#include "cpu/kernels/mask_grad.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PK_AVX2
#include "cpu/kernels/mask_grad_impl.h"

namespace prunekernels {
MaskGradKernels mask_grad_kernels_avx2() { return mask_grad_kernels_of<Avx2Lanes>(); }
}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // the table's x86 rows exist everywhere, but isa() never allows them here

namespace prunekernels {
MaskGradKernels mask_grad_kernels_avx2() { return {}; }
}  // namespace prunekernels

#endif
