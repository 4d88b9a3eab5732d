#include "cpu/kernels/batch_norm.h"

#include "cpu/isa.h"

namespace prunekernels {

#define PK_NORM(isa) NormKernels norm_kernels_##isa();
#include "kernel_table.inc"

namespace {

#include "cpu/kernels/batch_norm_impl.h"

struct Row {
  Isa isa;
  NormKernels (*kernels)();
};

constexpr Row kRows[] = {
#define PK_NORM(isa) {Isa::isa, norm_kernels_##isa},
#include "kernel_table.inc"
};

}  // namespace

NormKernels norm_kernels_scalar() { return kernels(); }

NormKernels norm_kernels() {
  const Isa allowed = isa();
  const Row* row = kRows;
  while (row->isa > allowed) ++row;  // ends: the last row is scalar
  return row->kernels();
}

}  // namespace prunekernels
