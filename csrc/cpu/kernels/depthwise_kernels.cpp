#include "cpu/kernels/depthwise_kernels.h"

#include "cpu/kernels/depthwise_impl.h"
#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_DEPTHWISE(isa) DepthwiseKernels depthwise_kernels_##isa();
#include "kernel_table.inc"

DepthwiseKernels depthwise_kernels_scalar() { return DepthwiseSet<ScalarFloat>::table(); }

const DepthwiseKernels& depthwise_kernels() {
  static constexpr IsaKernels<DepthwiseKernels> rows[] = {
#define PK_DEPTHWISE(isa) {Isa::isa, kernels_of<Isa::isa, depthwise_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
