#include "cpu/kernels/batch_norm.h"

#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_NORM(isa) NormKernels norm_kernels_##isa();
#include "kernel_table.inc"

namespace {

#include "cpu/kernels/batch_norm_impl.h"

}  // namespace

NormKernels norm_kernels_scalar() { return norm_kernels_of_target(); }

const NormKernels& norm_kernels() {
  static constexpr IsaKernels<NormKernels> rows[] = {
#define PK_NORM(isa) {Isa::isa, kernels_of<Isa::isa, norm_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
