// The avx2 rows of kernel_table.inc; channel_copy.cpp has its own.
#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/cast.h"
#include "cpu/kernels/depthwise_kernels.h"
#include "cpu/kernels/mask_grad.h"
#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/optim.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Everything below is compiled for AVX2. Headers whose functions other files share must come before.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PK_AVX2
#include "cpu/kernels/depthwise_impl.h"
#include "cpu/kernels/mask_grad_impl.h"
#include "cpu/kernels/microkernels_impl.h"
#include "cpu/kernels/optim_impl.h"

namespace prunekernels {
namespace {
#include "cpu/kernels/batch_norm_impl.h"
#include "cpu/kernels/cast_impl.h"
}  // namespace

DepthwiseKernels depthwise_kernels_avx2() { return DepthwiseSet<Avx2Float>::table(); }
Microkernels microkernels_avx2() { return MicrokernelSet<Avx2Float>::table(); }
OptimKernels optim_kernels_avx2() { return optim_kernels_of<MaskedAvx2>(); }
MaskGradKernels mask_grad_kernels_avx2() { return mask_grad_kernels_of<MaskedAvx2>(); }
NormKernels<float> norm_kernels_f32_avx2() { return norm_kernels_of_target<float>(); }
CastKernels cast_kernels_avx2() { return cast_kernels_of_target(); }
NormKernels<BFloat16> norm_kernels_bf16_avx2() { return norm_kernels_of_target<BFloat16>(); }

}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
