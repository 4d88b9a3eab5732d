#include "cpu/kernels/optim.h"

#include "cpu/isa.h"
#include "cpu/kernels/optim_impl.h"

namespace prunekernels {

#define PK_OPTIM(isa) OptimKernels optim_kernels_##isa();
#include "kernel_table.inc"

OptimKernels optim_kernels_scalar() { return optim_kernels_of<ScalarLanes<float>>(); }

namespace {

struct Row {
  Isa isa;
  const OptimKernels& (*kernels)();
};

// Filled in when first asked for: the code that does it may itself need the instruction set.
template <OptimKernels (*kMake)()>
const OptimKernels& made() {
  static const OptimKernels kernels = kMake();
  return kernels;
}

constexpr Row kRows[] = {
#define PK_OPTIM(isa) {Isa::isa, made<optim_kernels_##isa>},
#include "kernel_table.inc"
};

}  // namespace

const OptimKernels& optim_kernels() {
  const Isa allowed = isa();
  const Row* row = kRows;
  while (row->isa > allowed) ++row;  // ends: the last row is scalar
  return row->kernels();
}

template <typename T, typename A>
void optim_sgd(const OptimRows<T>& rows, const SgdNumbers<A>& numbers) {
  step_rows<ScalarLanes<T>, SgdRule<ScalarLanes<T>>>(rows, numbers);
}

template <typename T, typename A>
void optim_adamw(const OptimRows<T>& rows, const AdamwNumbers<A>& numbers) {
  step_rows<ScalarLanes<T>, AdamwRule<ScalarLanes<T>>>(rows, numbers);
}

#define PK_INSTANTIATE(T, A)                                          \
  template void optim_sgd(const OptimRows<T>&, const SgdNumbers<A>&); \
  template void optim_adamw(const OptimRows<T>&, const AdamwNumbers<A>&);
PK_INSTANTIATE(double, double)
PK_INSTANTIATE(BFloat16, float)
PK_INSTANTIATE(Half, float)
#undef PK_INSTANTIATE

}  // namespace prunekernels
