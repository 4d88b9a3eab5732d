#include "cpu/kernels/microkernels.h"

#include "cpu/kernels/isa_dispatch.h"
#include "cpu/kernels/microkernels_impl.h"

namespace prunekernels {

#define PK_MICROKERNELS(isa) Microkernels microkernels_##isa();
#include "kernel_table.inc"

Microkernels microkernels_scalar() { return MicrokernelSet<ScalarFloat>::table(); }

const Microkernels& microkernels() {
  static constexpr IsaKernels<Microkernels> rows[] = {
#define PK_MICROKERNELS(isa) {Isa::isa, kernels_of<Isa::isa, microkernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
