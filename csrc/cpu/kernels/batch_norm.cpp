#include "cpu/kernels/batch_norm.h"

#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_NORM_f32(isa) NormKernels<float> norm_kernels_f32_##isa();
#define PK_NORM_bf16(isa) NormKernels<BFloat16> norm_kernels_bf16_##isa();
#define PK_NORM(element, isa) PK_NORM_##element(isa)
#include "kernel_table.inc"
#undef PK_NORM_f32
#undef PK_NORM_bf16

namespace {

#include "cpu/kernels/batch_norm_impl.h"

}  // namespace

NormKernels<float> norm_kernels_f32_scalar() { return norm_kernels_of_target<float>(); }
NormKernels<BFloat16> norm_kernels_bf16_scalar() { return norm_kernels_of_target<BFloat16>(); }

template <>
const NormKernels<float>& norm_kernels<float>() {
  static constexpr IsaKernels<NormKernels<float>> rows[] = {
#define PK_NORM_f32(isa) {Isa::isa, kernels_of<Isa::isa, norm_kernels_f32_##isa>},
#define PK_NORM_bf16(isa)
#define PK_NORM(element, isa) PK_NORM_##element(isa)
#include "kernel_table.inc"
#undef PK_NORM_f32
#undef PK_NORM_bf16
  };
  return best_allowed(rows);
}

template <>
const NormKernels<BFloat16>& norm_kernels<BFloat16>() {
  static constexpr IsaKernels<NormKernels<BFloat16>> rows[] = {
#define PK_NORM_f32(isa)
#define PK_NORM_bf16(isa) {Isa::isa, kernels_of<Isa::isa, norm_kernels_bf16_##isa>},
#define PK_NORM(element, isa) PK_NORM_##element(isa)
#include "kernel_table.inc"
#undef PK_NORM_f32
#undef PK_NORM_bf16
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
