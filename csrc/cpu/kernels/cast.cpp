#include "cpu/kernels/cast.h"

#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_CAST(isa) CastKernels cast_kernels_##isa();
#include "kernel_table.inc"

namespace {

#include "cpu/kernels/cast_impl.h"

}  // namespace

CastKernels cast_kernels_scalar() { return cast_kernels_of_target(); }

const CastKernels& cast_kernels() {
  static constexpr IsaKernels<CastKernels> rows[] = {
#define PK_CAST(isa) {Isa::isa, kernels_of<Isa::isa, cast_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

}  // namespace prunekernels
