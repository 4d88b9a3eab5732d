#include "cpu/kernels/batch_norm.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace prunekernels {
namespace {
#include "cpu/kernels/batch_norm_impl.h"
}  // namespace
NormKernels norm_kernels_avx2() { return kernels(); }
}  // namespace prunekernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // the table's x86 rows exist everywhere, but isa() never allows them here

namespace prunekernels {
NormKernels norm_kernels_avx2() { return {}; }
}  // namespace prunekernels

#endif
