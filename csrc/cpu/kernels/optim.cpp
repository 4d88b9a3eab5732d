#include "cpu/kernels/optim.h"

#include "cpu/kernels/isa_dispatch.h"
#include "cpu/kernels/optim_impl.h"

namespace prunekernels {

#define PK_OPTIM(isa) OptimKernels optim_kernels_##isa();
#include "kernel_table.inc"

OptimKernels optim_kernels_scalar() { return optim_kernels_of<MaskedScalar<float>>(); }

const OptimKernels& optim_kernels() {
  static constexpr IsaKernels<OptimKernels> rows[] = {
#define PK_OPTIM(isa) {Isa::isa, kernels_of<Isa::isa, optim_kernels_##isa>},
#include "kernel_table.inc"
  };
  return best_allowed(rows);
}

template <typename T, typename A>
void optim_sgd(const OptimRows<T>& rows, const SgdNumbers<A>& numbers) {
  step_rows<MaskedScalar<T>, SgdRule<MaskedScalar<T>>>(rows, numbers);
}

template <typename T, typename A>
void optim_adamw(const OptimRows<T>& rows, const AdamwNumbers<A>& numbers) {
  step_rows<MaskedScalar<T>, AdamwRule<MaskedScalar<T>>>(rows, numbers);
}

#define PK_INSTANTIATE(T, A)                                          \
  template void optim_sgd(const OptimRows<T>&, const SgdNumbers<A>&); \
  template void optim_adamw(const OptimRows<T>&, const AdamwNumbers<A>&);
PK_INSTANTIATE(double, double)
PK_INSTANTIATE(BFloat16, float)
PK_INSTANTIATE(Half, float)
#undef PK_INSTANTIATE

}  // namespace prunekernels
